"""What SHTA's branch says of labeled images: their tokens, embeddings and assignments, read from trained runs.

The branch is not part of a model that predicts. It is in the training state next to a checkpoint, and reads the feature
that the checkpoint's network has before its last layer. Images and labels go through nnU-Net's preprocessing; patches
lie side by side and do not overlap, so each token is seen once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_ssl.declared import build
from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.runs import TrainedRun, load_predictor, reason, settings_of, without_epochs
from nnunet_ssl.figures.test_set import Case
from nnunet_ssl.losses.shta import token_class_distribution
from nnunet_ssl.networks.feature_tap import FeatureTap
from nnunet_ssl.networks.shta_branch import SHTABranch
from nnunet_ssl.trainers.resuming import find_training_state, training_state_file
from nnunet_ssl.trainers.shta import SHTASettings, build_branch

BRANCH = "shta_first."  # of the network that predicts
BACKGROUND = "#999999"  # unlike the colors of classes
NOT_SHOWN = -1
PREPARED_BY = ("preprocessor_name", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm")


@dataclass(frozen=True)
class TrainedModel:
    """A trained network in evaluation mode, and how nnU-Net prepares images for it."""

    tap: FeatureTap  # gives the last decoder feature as well
    predictor: nnUNetPredictor


@dataclass(frozen=True)
class Patches:
    """The patches of one case that hold eligible tokens, P of them with L tokens each."""

    case: str  # its name
    images: Tensor  # [P, C, *patch]
    # [P, L] int64, of eligible tokens the most frequent foreground class (y_i of Eq. 8), of wholly background ones 0
    # where they are wanted, of all others NOT_SHOWN
    classes: Tensor
    counted: Tensor | None  # [P, 1, *patch] bool, voxels that are not ignored; None without an ignore label


@dataclass(frozen=True)
class Tokens:
    """The N tokens of one case that are shown, as one network sees them, all on the CPU."""

    case: str  # its name
    feature: Tensor  # [N, C], T of Eq. 1
    classes: Tensor  # [N], as of Patches
    embedding: Tensor | None = None  # [N, C_z], Z of Eq. 1; None of a network without a branch
    assignment: Tensor | None = None  # [N, K], q of Eq. 3; also None without a branch


def has_branch(run: TrainedRun) -> bool:
    """Whether a run was trained with SHTA, by the settings that it wrote down."""
    return settings_of(run).get("shta_weight", 0) != 0


def baseline_and_shta(runs: Sequence[TrainedRun]) -> tuple[TrainedRun | None, TrainedRun | None]:
    """The two runs to compare: SHTA on a host, and that host.

    The first run with SHTA whose host is among the runs, after as many epochs or, where there is none, after others;
    else the first without and the first with SHTA; either may be missing.
    """
    with_shta = [run for run in runs if has_branch(run)]
    without = [run for run in runs if run not in with_shta]
    for run in with_shta:
        own = run.trainer.replace("SHTA_", "")
        for host in sorted(without, key=lambda host: host.trainer != own):
            if without_epochs(host.trainer) == without_epochs(own):
                return host, run
    return next(iter(without), None), next(iter(with_shta), None)


def load_model(run: TrainedRun, device: str) -> TrainedModel:
    """The network of a run, as nnU-Net's predictor builds it.

    Raises:
        UserError: the network has no decoder whose last feature could be read.
    """
    predictor = load_predictor(run, device)
    network = getattr(predictor.network, "_orig_mod", predictor.network)  # without torch.compile
    try:
        tap = FeatureTap(network.to(device).eval())
    except TypeError as error:
        raise UserError(f"{run.checkpoint_file}: {error}. Leave {run.trainer} out.") from error
    return TrainedModel(tap, predictor)


def load_branch(run: TrainedRun, model: TrainedModel) -> SHTABranch:
    """The branch that was trained with the checkpoint of a run, in evaluation mode, where the run's model is.

    Raises:
        UserError: the training state is missing, or of another checkpoint, or holds no branch.
    """
    file = training_state_file(str(run.checkpoint_file))
    _, state = find_training_state(file, model.tap.network)
    weights = {} if state is None else state["modules"]
    weights = {name.removeprefix(BRANCH): w for name, w in weights.items() if name.startswith(BRANCH)}
    if not weights:
        raise UserError(
            f"{file} does not hold the SHTA branch that was trained with {run.checkpoint}: it is missing, damaged or "
            "of another checkpoint. Restore it, or name another checkpoint with -chk."
        )
    try:
        stored = state.get("settings", settings_of(run))  # early versions of this package did not write them there
        ours = {field.name for field in dataclasses.fields(SHTASettings)}
        stored = {name: value for name, value in stored.items() if name in ours}
        settings = build(SHTASettings, stored, f"{file}, settings,", "a setting of SHTA")
        network, configuration = model.tap.network, model.predictor.configuration_manager
        branch = build_branch(
            settings,
            getattr(network, "decoder", network).seg_layers[-1].in_channels,
            configuration,
            model.predictor.label_manager,
            configuration.batch_size,
        )
        branch.load_state_dict(weights)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{file} holds no SHTA branch that can be built ({reason(error)}). Restore it.") from error
    return branch.to(next(model.tap.parameters()).device).eval()


def preparation(model: TrainedModel, branch: SHTABranch) -> str:
    """What decides how ``cut_patches`` prepares and cuts a case: models in which it is equal can share the patches."""
    plans, configuration = model.predictor.plans_manager.plans, model.predictor.configuration_manager.configuration
    parts = [
        {key: value for key, value in configuration.items() if key in PREPARED_BY or key.startswith("resampling")},
        plans["foreground_intensity_properties_per_channel"],
        plans["transpose_forward"],
        plans["image_reader_writer"],
        [branch.stride, branch.ignore_label, branch.min_valid_fraction],
        [branch.loss.settings.shta_fg_threshold, branch.loss.settings.shta_purity_threshold],
    ]
    return json.dumps(parts, sort_keys=True)


def cut_patches(model: TrainedModel, branch: SHTABranch, case: Case, background: bool = False) -> Patches:
    """Prepare a case, and cut out the patches with tokens that the branch could select.

    What pads the image to whole patches counts as unlabeled: a token that is mostly padding is none. ``background``:
    the wholly background tokens of these patches are wanted as well.
    """
    predictor, configuration = model.predictor, model.predictor.configuration_manager
    image, labels, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(file) for file in case.images],
        str(case.label),
        predictor.plans_manager,
        configuration,
        predictor.dataset_json,
    )
    outside = branch.num_classes if branch.ignore_label is None else branch.ignore_label
    images = side_by_side(torch.as_tensor(image), configuration.patch_size, 0)
    labels = side_by_side(torch.as_tensor(labels), configuration.patch_size, outside)
    # a few patches at a time: counting takes several times the memory of the labels
    counts = [
        token_class_distribution(few[:, 0], branch.stride, branch.num_classes, outside, branch.min_valid_fraction)[0]
        for few in labels.split(configuration.batch_size)
    ]
    shares = torch.cat(counts)
    eligible, classes = (each.reshape(shares.shape[:2]) for each in branch.loss.eligible(shares.flatten(0, 1)))
    classes = classes.masked_fill(~eligible, NOT_SHOWN)
    if background:
        classes[shares[..., 0] == 1] = 0
    keep = eligible.any(1)
    counted = None if branch.ignore_label is None else labels[keep] != branch.ignore_label
    return Patches(case.name, images[keep], classes[keep], counted)


def side_by_side(volume: Tensor, patch_size: Sequence[int], fill: float) -> Tensor:
    """Pad a volume to whole patches, as nnU-Net pads, and cut it into them.

    Args:
        volume: ``[C, *spatial]``; with one axis more than ``patch_size`` the first spatial axis counts slices.
        patch_size: voxels along each axis.
        fill: value of the padding.

    Returns:
        ``[P, C, *patch]``.
    """
    patches = pad_nd_image(volume, patch_size, "constant", {"value": fill}, False, tuple(patch_size))
    first = patches.ndim - len(patch_size)
    for axis, size in enumerate(patch_size, first):
        patches = patches.unfold(axis, size, size)
    grid = volume.ndim - 1  # [C, *grid, *patch] -> [*grid, C, *patch]
    return patches.movedim(0, grid).flatten(0, grid - 1)


@torch.inference_mode()
def read_tokens(model: TrainedModel, branch: SHTABranch, patches: Patches, embed: bool) -> Tokens:
    """Run a network over the patches of a case, at least one, and keep what it says of the tokens that are shown.

    ``embed`` tells whether the branch was trained with this very network; any of the same configuration will do.
    """
    device = next(model.tap.parameters()).device
    batch_size = model.predictor.configuration_manager.batch_size
    shown = patches.classes != NOT_SHOWN
    features, embeddings, assignments = [], [], []
    images_of, shown_of = patches.images.split(batch_size), shown.split(batch_size)
    counted_of = [None] * len(images_of) if patches.counted is None else patches.counted.split(batch_size)
    for images, here, counted in zip(images_of, shown_of, counted_of, strict=True):
        with torch.autocast(device.type, enabled=device.type == "cuda"):  # as nnU-Net predicts
            _, feature = model.tap(images.to(device))
        tokens = branch.tokens(feature, None if counted is None else counted.to(device))[here.to(device)]
        features.append(tokens.cpu())
        if embed:
            embedding = branch.embed(tokens)
            embeddings.append(embedding.cpu())
            assignments.append(branch.loss.log_assignment(embedding).exp().cpu())
    return Tokens(
        patches.case,
        torch.cat(features),
        patches.classes[shown],
        torch.cat(embeddings) if embed else None,
        torch.cat(assignments) if embed else None,
    )
