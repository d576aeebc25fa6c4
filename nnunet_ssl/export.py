"""Writes a trained model as a model of plain nnU-Net, and keeps it only if it gives the same answers.

The checkpoints of this package hold nnU-Net's own network already. An export is what one hands on: weights on the CPU,
no optimizer, nothing but tensors and builtins (so that ``torch.load(..., weights_only=True)`` reads it), under the
name of nnU-Net's own trainer. The second network of a method with two becomes a separate fold: nnU-Net averages the
folds that it is given.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from copy import deepcopy
from typing import Literal, NamedTuple

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import convert_trainer_plans_config_to_identifier, get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn

from nnunet_ssl import trainers
from nnunet_ssl.checkpoints import read_checkpoint, save_whole
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import writing
from nnunet_ssl.names import path_component
from nnunet_ssl.trainers.resuming import find_training_state, training_state_file
from nnunet_ssl.unlabeled.find import read_dataset_json, read_plans, required_folder, resolve_dataset

PLAIN_TRAINER = nnUNetTrainer.__name__
RESTORE = "Restore it from the folder of the preprocessed dataset."
POSTPROCESSING = ("summary.json", "postprocessing.pkl", "postprocessing.json")
MODEL_FILES = ("plans.json", "dataset.json", "dataset_fingerprint.json")


class ExportedFold(NamedTuple):
    """One fold of the exported model and where it came from."""

    fold: int | str
    source_fold: int | str
    network: str  # "first" or "second"; "high", of a network with two branches


def export_model(
    dataset: int | str,
    configuration: str,
    folds: Sequence[int | str],
    output: str,
    trainer: str = "nnUNetTrainerSHTA_CPS",
    plans: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    both: bool = False,
    branch: Literal["high"] | None = None,
) -> tuple[str, list[ExportedFold]]:
    """Write ``output/<dataset>/nnUNetTrainer__<plans>__<configuration>/fold_X/checkpoint_final.pth``.

    Everything is written to a folder with a temporary name and renamed when each file has passed ``verify``.

    Args:
        dataset, configuration, trainer, plans: as nnU-Net's commands take them.
        folds: the folds to export, numbers or ``"all"``. They keep their names; with ``both`` the i-th of them becomes
            folds 2i (first network) and 2i + 1 (second network).
        output: the folder to write; must not exist or be empty.
        checkpoint: which checkpoint of each fold to export.
        both: export the second network too (methods that train two).
        branch: export this branch alone (SASNet): the low-level one is no network that plans describe.

    Returns:
        The exported model's folder, as ``nnUNetv2_predict_from_modelfolder -m`` takes it, and its folds.

    Raises:
        UserError: no such model, fold or checkpoint; ``output`` is not empty; ``both`` without a second network; the
            network is not the one that the plans describe; ``branch`` of a network without branches, or none of one
            with branches.
    """
    if os.path.isfile(output) or (os.path.isdir(output) and os.listdir(output)):
        raise UserError(f"{output} exists already. Name a folder that does not exist yet, or empty this one.")
    model = find_model_folder(dataset, trainer, plans, configuration)
    sources = {fold: os.path.join(model, f"fold_{fold}", checkpoint) for fold in folds}
    for file in sources.values():
        if not os.path.isfile(file):
            raise UserError(f"no checkpoint {file}. Train this fold to its end, or name another with -f or -chk.")

    output = os.path.abspath(output)
    dataset_name = os.path.basename(os.path.dirname(model))
    name = os.path.join(dataset_name, convert_trainer_plans_config_to_identifier(PLAIN_TRAINER, plans, configuration))
    partial = f"{output}.partial{os.getpid()}"
    target = os.path.join(partial, name)
    exported: list[ExportedFold] = []
    try:
        with writing("Make room, or name another folder with -o."):
            os.makedirs(target)
            for file in MODEL_FILES:
                shutil.copyfile(os.path.join(model, file), os.path.join(target, file))
            for i, (fold, source) in enumerate(sources.items()):
                for j, network in enumerate(("first", "second") if both else (branch or "first",)):
                    new = ExportedFold(2 * i + j if both else fold, fold, network)
                    _export_fold(source, trainer, configuration, new, target)
                    exported.append(new)
            if checkpoint == "checkpoint_final.pth" and not both and branch is None:
                _copy_postprocessing(model, folds, target)
            if os.path.isdir(output):
                os.rmdir(output)  # empty, as seen above
            os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return os.path.join(output, name), exported


def _copy_postprocessing(model: str, folds: Sequence[int | str], target: str) -> None:
    """What nnUNetv2_find_best_configuration has found for these folds, as nnU-Net's own export takes it along."""
    name = f"crossval_results_folds_{'_'.join(map(str, folds))}"
    for file in POSTPROCESSING:
        if os.path.isfile(found := os.path.join(model, name, file)):
            os.makedirs(os.path.join(target, name), exist_ok=True)
            shutil.copyfile(found, os.path.join(target, name, file))


def find_model_folder(dataset: int | str, trainer: str, plans: str, configuration: str) -> str:
    """The folder that nnU-Net trained this model into.

    Raises:
        UserError: ``nnUNet_results`` is not set, or holds no such model.
    """
    required_folder("nnUNet_results")
    for option, name in (("-tr", trainer), ("-p", plans), ("-c", configuration)):
        path_component(name, "name", option)
    model = get_output_folder(resolve_dataset(dataset), trainer, plans, configuration)
    for file in MODEL_FILES:
        if not os.path.isfile(os.path.join(model, file)):
            raise UserError(f"no trained model in {model} ({file} is missing). Check -d, -c, -tr and -p.")
    read_plans(os.path.join(model, "plans.json"), RESTORE, configuration)
    read_dataset_json(model)
    return model


def second_network_weights(checkpoint_file: str, first: nn.Module, trainer: str) -> dict[str, torch.Tensor]:
    """The weights of the second network, from the training state next to a checkpoint, written with ``first``.

    Raises:
        UserError: there is no training state, it belongs to another checkpoint, or has no second network.
    """
    file = training_state_file(checkpoint_file)
    _, state = find_training_state(file, first)
    if state is None:
        what = "was written with another checkpoint" if os.path.isfile(file) else "does not exist"
        raise UserError(f"--both needs {file}, which {what}. Restore it, or export the first network without --both.")
    weights = {k.removeprefix("second."): v for k, v in state["modules"].items() if k.startswith("second.")}
    if not weights:
        raise UserError(f"{trainer} trains no second network. Export without --both.")
    return weights


def verify(exported_file: str, trained: nn.Module, model: str, predicts: str) -> None:
    """Load an exported file as plain nnU-Net would and compare its logits with those of ``trained``, on the CPU.

    Args:
        exported_file, trained: the file to check, and the trained network.
        model: folder with the ``plans.json`` and ``dataset.json`` that go with the file.
        predicts: the trainer whose network nnU-Net predicts with, by the checkpoint that was exported.

    Raises:
        UserError: the weights do not fit the plans' network, or the logits on a random patch differ.
    """
    # weights_only refuses anything but tensors and builtins
    checkpoint = torch.load(exported_file, map_location="cpu", weights_only=True)
    plain, patch_shape = _network_of(nnUNetTrainer, model, checkpoint["init_args"]["configuration"])
    patch = torch.rand(1, *patch_shape)
    try:
        plain.load_state_dict(checkpoint["network_weights"])
    except RuntimeError:  # other weights
        same = False
    else:
        with torch.no_grad():
            same = torch.equal(trained.eval()(patch), plain.eval()(patch))
    if not same:
        advice = f"Predict where {predicts} is installed: nnUNetv2_predict builds its network."
        if predicts == PLAIN_TRAINER:
            advice = (
                f"Its checkpoint names {PLAIN_TRAINER}, so nnUNetv2_predict would give other results than the network "
                "that was trained. Train it again: with this version the checkpoint names the trainer itself."
            )
        raise UserError(
            f"the trained network is not the one that {os.path.join(model, 'plans.json')} describes, so plain nnU-Net "
            f"cannot stand in for it. {advice}"
        )


def _network_of(
    trainer_class: type[nnUNetTrainer], model: str, configuration: str
) -> tuple[nn.Module, tuple[int, ...]]:
    """The network that a trainer builds for prediction from the plans in a model folder, and the shape of a patch.

    Raises:
        UserError: nnU-Net cannot build it, from plans that somebody has edited.
    """
    file = os.path.join(model, "plans.json")
    plans_manager, dataset_json = read_plans(file, RESTORE), read_dataset_json(model)
    try:
        manager = plans_manager.get_configuration(configuration)
        channels = determine_num_input_channels(plans_manager, manager, dataset_json)
        heads = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
        network = trainer_class.build_network_architecture(
            plans_manager, manager, channels, heads, enable_deep_supervision=False
        )
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{trainer_class.__name__} cannot build its network from {file} ({what}). {RESTORE}") from error
    return network, (channels, *manager.patch_size)


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """A trainer of this package, or one that nnU-Net finds by itself.

    Raises:
        UserError: nobody knows the name.
    """
    ours = getattr(trainers, name, None)
    if ours is not None:
        return ours
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise UserError(f"no trainer is called {name}. nnUNetv2_ssl_trainers lists this package's.") from error


def _export_fold(source: str, trainer: str, configuration: str, new: ExportedFold, target: str) -> None:
    """Write one network of one fold into the model folder ``target``, and verify it."""
    remedy = "Restore it, or name another with -f or -chk."
    checkpoint = read_checkpoint(source, remedy, {"network_weights": dict, "init_args": dict, "current_epoch": int})
    if (other := checkpoint["init_args"].get("configuration")) != configuration:
        raise UserError(f"{source} is of the configuration {other!r}, not of {configuration}. {remedy}")
    trained, _ = _network_of(find_trainer(trainer), target, configuration)
    weights = checkpoint["network_weights"]
    try:
        trained.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # other shapes; no tensors; names that are no text
        raise UserError(f"{source} has no weights of the network that {trainer} trains here. {remedy}") from error
    if new.network == "second":
        weights = second_network_weights(source, trained, trainer)
        trained.load_state_dict(weights)
    elif getattr(trained, "low_decoder", None) is not None:
        if new.network != "high":
            raise UserError(
                f"{trainer} trains a network with two branches, which plain nnU-Net does not know. Export only "
                "the high-level one with --branch high, or predict with this package installed."
            )
        trained.branch = "high"
        weights = {k: v for k, v in weights.items() if not k.startswith("low_decoder.")}
    elif new.network == "high" and not hasattr(trained, "low_decoder"):
        raise UserError(f"{trainer} trains a network without branches. Export without --branch.")
    # what nnU-Net reads to predict or to start from pretrained weights, and no more
    plain = {
        "current_epoch": checkpoint["current_epoch"],
        "init_args": {**deepcopy({k: v for k, v in checkpoint["init_args"].items() if k != "device"}), "device": "cpu"},
        "trainer_name": PLAIN_TRAINER,
        "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes"),
        "exported_from": {
            "trainer": trainer,
            "fold": str(new.source_fold),
            "checkpoint": os.path.basename(source),
            "network": new.network,
        },
    }
    recursive_fix_for_json_export(plain)  # numpy scalars become Python's
    # tensors that share memory still do: the encoder is named twice, and what is shared is written once
    plain["network_weights"] = {k: v.detach() for k, v in weights.items()}
    file = os.path.join(target, f"fold_{new.fold}", "checkpoint_final.pth")
    os.makedirs(os.path.dirname(file))
    save_whole(plain, file)
    verify(file, trained, target, str(checkpoint.get("trainer_name")))
