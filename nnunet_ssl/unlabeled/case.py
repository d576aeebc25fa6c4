"""One unlabeled image through nnU-Net's preprocessing, checked before and after."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.names import file_ending, path_component
from nnunet_ssl.unlabeled.check import BadImageError, CheckingPlans
from nnunet_ssl.unlabeled.find import channel_names, required_folder
from nnunet_ssl.unlabeled.stamps import image_stamps
from nnunet_ssl.unlabeled.store import Outcome, disk_failure, memory_failure


@dataclass(frozen=True)
class Preparation:
    """What the images of a dataset are prepared by, as nnU-Net has it, in what a spawned worker can be sent.

    Raises:
        UserError: there is no such configuration, or ``dataset.json`` names no file ending.
    """

    dataset_name: str
    plans: dict
    configuration: str
    dataset_json: dict

    def __post_init__(self) -> None:
        plans_manager = PlansManager(self.plans)
        file_ending(self.dataset_json.get("file_ending"), f"dataset.json of {plans_manager.dataset_name}")
        if self.configuration not in plans_manager.available_configurations:
            raise UserError(
                f"the plans {plans_manager.plans_name} have no configuration {self.configuration}, but "
                f"{', '.join(plans_manager.available_configurations)}."
            )

    @property
    def again(self) -> str:
        """How the labeled cases are prepared anew, as the start of a remedy."""
        return f"Run nnUNetv2_preprocess -d {self.dataset_name} -plans_name {self.plans_name} -c {self.configuration}"

    @property
    def plans_name(self) -> str:
        """As ``-p`` takes it."""
        return self.plans["plans_name"]

    @cached_property
    def preprocessing(self) -> dict:
        """What in the plans and ``dataset.json`` determines a prepared image, by name, in plain JSON types.

        Patch size, batch size and network do not.
        """
        plans_manager = PlansManager(self.plans)
        of_configuration = plans_manager.get_configuration(self.configuration).configuration
        decisive = {
            **{
                key: of_configuration.get(key)
                for key in (
                    "data_identifier",
                    "preprocessor_name",
                    "spacing",
                    "normalization_schemes",
                    "use_mask_for_norm",
                    "resampling_fn_data",
                    "resampling_fn_data_kwargs",
                    "resampling_fn_seg",
                    "resampling_fn_seg_kwargs",
                )
            },
            "transpose_forward": plans_manager.transpose_forward,
            "foreground_intensity_properties": plans_manager.foreground_intensity_properties_per_channel,
            "image_reader_writer": self.plans["image_reader_writer"],
            "channel_names": channel_names(self.dataset_json),
            "file_ending": self.dataset_json["file_ending"],
        }
        return json.loads(json.dumps(decisive))

    @cached_property
    def labeled_folder(self) -> str:
        """Of the prepared labeled cases; raises as the function of that name."""
        return labeled_folder(self.dataset_name, PlansManager(self.plans).get_configuration(self.configuration))


def labeled_folder(dataset_name: str, configuration_manager: ConfigurationManager) -> str:
    """nnU-Net's folder of a configuration's prepared labeled cases.

    Raises:
        UserError: the names in the plans lead out of the dataset's folder.
    """
    source = f"the plans of {dataset_name}"
    return os.path.join(
        required_folder("nnUNet_preprocessed"),
        path_component(dataset_name, "dataset_name", source),
        path_component(configuration_manager.data_identifier, "data_identifier", source),
    )


def prepare_case(task: Preparation, case: str, files: list[str], folder: str) -> Outcome:
    """Prepare one image into its own folder. Errors come back as values: raising would break the pool."""
    plans_manager = CheckingPlans(task.plans, len(channel_names(task.dataset_json)), task.configuration)
    configuration_manager = plans_manager.get_configuration(task.configuration)
    entry: dict = {"raw": []}
    try:
        entry["raw"] = image_stamps({case: files})[case]
        os.makedirs(folder)
        preprocessor = configuration_manager.preprocessor_class(verbose=False)
        preprocessor.run_case_save(
            os.path.join(folder, case), files, None, plans_manager, configuration_manager, task.dataset_json
        )
        try:
            dataset_class = infer_dataset_class(folder)
        except (AssertionError, LookupError):
            written = ", ".join(sorted(os.listdir(folder))) or "nothing"
            name = configuration_manager.preprocessor_name
            problem = f"{name}, the preprocessor of the plans, writes what no dataset of nnU-Net reads ({written})."
            return Outcome(case, entry, f"{problem} Plan with another one.", fatal=True)
        _read_back(dataset_class, folder, case, files)
        if image_stamps({case: files}, {case: entry["raw"]})[case] != entry["raw"]:
            return Outcome(case, entry, f"{files[0]} changed while it was being prepared. Run the same command again.")
    except UserError as error:
        return Outcome(case, entry, error.args[0])
    except BadImageError as error:
        return Outcome(case, entry, str(error))
    except Exception as error:
        less = "Prepare fewer at a time (nnUNetv2_ssl_preprocess -np 1)"
        if why := memory_failure(error, f"{files[0]} does", less):
            return Outcome(case, entry, why)
        if lost := disk_failure(error, folder):
            return Outcome(case, entry, lost, fatal=True)
        problem = f"{files[0]} cannot be preprocessed ({type(error).__name__}: {error}). Replace or remove it."
        return Outcome(case, entry, problem)
    return Outcome(case, entry)


def _read_back(dataset_class: type, folder: str, case: str, files: list[str]) -> None:
    """Make sure that what was written can be read and trained on."""
    data, seg, *_ = dataset_class(folder, [case]).load_case(case)
    _ = seg[:]
    if not np.isfinite(data[:]).all():
        raise BadImageError(
            f"{files[0]}: after normalization and resampling the image has voxels that are NaN or infinite. "
            "Look at its intensities, or remove it."
        )
