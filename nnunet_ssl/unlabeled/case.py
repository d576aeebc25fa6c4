"""One unlabeled image through nnU-Net's preprocessing, checked before and after."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.names import file_ending
from nnunet_ssl.unlabeled.check import BadImageError, CheckingPlans
from nnunet_ssl.unlabeled.find import channel_names
from nnunet_ssl.unlabeled.stamps import image_stamps
from nnunet_ssl.unlabeled.store import Outcome, disk_failure


def preprocessing_of(plans_manager: PlansManager, configuration: str, dataset_json: dict) -> dict:
    """What in the plans and ``dataset.json`` determines a prepared image. Patch size, batch size and network do not.

    Returns:
        By name, in plain JSON types.
    """
    plans = plans_manager.plans
    of_configuration = plans_manager.get_configuration(configuration).configuration
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
        "image_reader_writer": plans["image_reader_writer"],
        "channel_names": channel_names(dataset_json),
        "file_ending": dataset_json["file_ending"],
    }
    return json.loads(json.dumps(decisive))


@dataclass
class Preparation:
    """How to prepare, in what a spawned worker can be sent."""

    plans: dict
    configuration: str
    dataset_json: dict
    preprocessing: dict = field(init=False)

    def __post_init__(self) -> None:
        plans_manager = PlansManager(self.plans)
        file_ending(self.dataset_json.get("file_ending"), f"dataset.json of {plans_manager.dataset_name}")
        if self.configuration not in plans_manager.available_configurations:
            raise UserError(
                f"the plans {plans_manager.plans_name} have no configuration {self.configuration}, but "
                f"{', '.join(plans_manager.available_configurations)}."
            )
        self.preprocessing = preprocessing_of(plans_manager, self.configuration, self.dataset_json)

    @property
    def configuration_manager(self) -> ConfigurationManager:
        return PlansManager(self.plans).get_configuration(self.configuration)


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
            f"{files[0]}: after normalisation and resampling the image has voxels that are NaN or infinite. "
            "Look at its intensities, or remove it."
        )
