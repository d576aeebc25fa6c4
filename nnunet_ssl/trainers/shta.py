"""SHTA on any host: a mixin, and the trainers that it makes.

Source: Zhang, Zhong, Zhang, Liu, "SHTA: Semantic Hard Token Correction and Center Alignment for Semi-Supervised Medical
Image Segmentation". The losses are in :mod:`nnunet_ssl.losses.shta`, the branch in
:mod:`nnunet_ssl.networks.shta_branch`. A host knows nothing of SHTA.
"""

from __future__ import annotations

from typing import Literal

from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from nnunet_ssl import trainers
from nnunet_ssl.declared import Count, Counts, Share, Weight, declared, setting
from nnunet_ssl.errors import UserError
from nnunet_ssl.losses.shta import SHTALossSettings
from nnunet_ssl.networks.shta_branch import SHTABranch, token_stride
from nnunet_ssl.trainers.base import Stream, full_resolution, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings

PAPER = "Zhang et al., SHTA: Semantic Hard Token Correction and Center Alignment"


@declared
class SHTASettings(SHTALossSettings, SSLSettings):
    """Settings of SHTA. The paper states neither weights nor thresholds; docs/methods.md says where they come from."""

    shta_weight: Weight = setting(
        0.1, "Weight in Eq. 2; with `0` there is no branch, and the run equals the host's, bit for bit", symbol="lambda"
    )
    shta_warmup: Share = setting(0.0, "Share of the training over which lambda grows linearly")
    shta_attach: Literal["first", "all"] = setting("first", 'Networks that carry a branch: `"first"`, or `"all"`')
    shta_stride: Counts = setting((), "Voxels per token along each axis, divisors of the patch; `[]` is three or four")
    shta_max_tokens: Count = setting(262144, "Most labeled tokens per step; the default stride grows to stay within it")
    # the paper's ratio of parameters asks for more than the feature's channels
    shta_hidden_dim: Count = setting(256, "Width of g in Eq. 1")
    shta_embedding_dim: Count = setting(128, "Dimensions of an embedding", symbol="C_z")  # room for many classes, cheap


READOUTS = "assign anchor hard center hard_share candidate_share token_accuracy proxy_cosine center_gap".split()


class SHTAMixin(nnUNetTrainerSSL):
    """Adds ``lambda * L_SHTA`` on the labeled images' last decoder feature to a host (Eq. 2).

    ``nnUNetTrainerSHTA_X`` is made of it and ``nnUNetTrainerX``, with the settings of both: see ``__getattr__`` below.
    The branch exists in training only; unlabeled images never enter it. On URPC with dropout it reads the feature
    after that, as the full-resolution head does; on MagicNet the student's forward of the unmixed labeled images.
    """

    supports_regions = False
    settings: SHTASettings

    def networks_with_shta(self) -> list[str]:
        """Names of the networks that carry a branch; a teacher, which does not learn, never does."""
        if self.settings.shta_weight == 0:
            return []
        if self.settings.shta_attach == "first":
            return ["first"]
        return [name for name, network in self.networks().items() if next(network.parameters()).requires_grad]

    def tapped_networks(self) -> set[str]:
        """SHTA reads the last decoder feature of the networks that carry it."""
        return super().tapped_networks() | set(self.networks_with_shta())

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The host's modules, and a branch for each network that carries one."""
        self.training_modules = nn.ModuleDict(super().build_training_modules())  # networks() looks its networks up here
        branches = {f"shta_{name}": self._build_branch(name) for name in self.networks_with_shta()}
        return {**self.training_modules, **branches}

    def _build_branch(self, name: str) -> SHTABranch:
        network = self.networks()[name]
        self.require_decoder(network, "to read the last feature of")
        with self.seeded("shta", name):
            branch = build_branch(
                self.settings,
                network.decoder.seg_layers[-1].in_channels,
                self.configuration_manager,
                self.label_manager,
                self.batch_size,
            )
        self.print_to_log_file(f"SHTA on the {name} network, tokens of {' x '.join(map(str, branch.stride))} voxels")
        return branch

    @property
    def _foreground_classes(self) -> dict[int, str]:
        """label -> name of the classes that have tokens."""
        labels = self.dataset_json["labels"]
        names = {label[0] if isinstance(label, list) else label: name for name, label in labels.items()}
        return {label: names[label] for label in self.label_manager.foreground_labels}

    def term_weights(self) -> dict[str, float]:
        """lambda, with its warm-up if there is one."""
        weights = super().term_weights()
        if self.networks_with_shta():
            length = self.settings.shta_warmup * self.total_steps
            weights["shta"] = self.settings.shta_weight * min(1.0, self.global_step / length if length > 0 else 1.0)
        return weights

    def on_feature(self, name: str, stream: Stream, feature: Tensor) -> dict[str, Tensor]:
        """L_SHTA of one network on labeled images; the readouts of Table IV go to the log."""
        terms = super().on_feature(name, stream, feature)
        if stream.target is None or name not in self.networks_with_shta():
            return terms
        shta = self.training_modules[f"shta_{name}"](feature, full_resolution(stream.target))
        for readout in READOUTS:
            self.log_value(f"shta_{readout}", getattr(shta, readout))
        # separate panels: counts among shares
        self.log_value("classes_references", shta.num_references)  # |K'|
        self.log_value("classes_centers", shta.num_centers)  # |K_h|
        self.log_value("tokens_hard", shta.num_hard)
        for label, of_class in self._foreground_classes.items():
            self.log_value(f"candidates_{of_class}", shta.candidates_of_class[label])
            self.log_value(f"hard_{of_class}", shta.hard_of_class[label])  # |Omega_k|
        return {**terms, "shta": shta.total}


def build_branch(
    settings: SHTASettings,
    in_channels: int,
    configuration_manager: ConfigurationManager,
    label_manager: LabelManager,
    batch_size: int,
) -> SHTABranch:
    """The branch that these settings describe, with weights drawn from torch's generator.

    ``in_channels`` are the decoder feature's, ``batch_size`` is of labeled samples in a step of one GPU.

    Raises:
        UserError: if ``shta_stride`` does not divide the patch.
    """
    patch_size, stride = configuration_manager.patch_size, list(settings.shta_stride)
    if not stride:
        stride = token_stride(patch_size, configuration_manager.spacing, batch_size, settings.shta_max_tokens)
    if len(stride) != len(patch_size) or any(s < 1 or n % s for n, s in zip(patch_size, stride, strict=True)):
        raise UserError(
            f"shta_stride {stride} does not divide the patch {list(patch_size)} of the plans; give a divisor for each "
            "axis, or [] for the default."
        )
    return SHTABranch(
        in_channels,
        stride,
        label_manager.num_segmentation_heads,
        settings.shta_hidden_dim,
        settings.shta_embedding_dim,
        label_manager.ignore_label,
        settings,
    )


def on_host(host: type[nnUNetTrainerSSL]) -> type[SHTAMixin]:
    """``nnUNetTrainerSHTA_<X>``: SHTA on ``nnUNetTrainer<X>``, no matter what its losses are."""
    name = f"{trainers.SHTA}{host.__name__.removeprefix('nnUNetTrainer')}"
    body = {"__module__": __name__, "__doc__": f"Settings of SHTA on {host.__name__}."}
    settings = declared(type(f"{name}Settings", (SHTASettings, host.Settings), body))
    what = f"SHTA on {host.__name__}: token embeddings of the labeled images are tied to class proxies and centers."
    body = {"__module__": trainers.__name__, "__doc__": what, "paper": PAPER, "Settings": settings}
    return type(name, (SHTAMixin, host), body)


def __getattr__(name: str) -> type:
    if not name.startswith(trainers.SHTA):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = on_host(getattr(trainers, f"nnUNetTrainer{name.removeprefix(trainers.SHTA)}"))
    return made
