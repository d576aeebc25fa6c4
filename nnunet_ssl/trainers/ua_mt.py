"""UA-MT: Uncertainty-Aware Mean Teacher (Yu et al., MICCAI 2019)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from nnunet_ssl.declared import Count, Decay, Part, declared, setting
from nnunet_ssl.losses.entropy import entropy
from nnunet_ssl.losses.masked import masked_mean
from nnunet_ssl.networks.dropout import drop_channels_in_training
from nnunet_ssl.networks.ema import EMATeacher, noisy
from nnunet_ssl.trainers.mean_teacher import MeanTeacherSettings, Taught


@declared
class UAMTSettings(MeanTeacherSettings):
    """Settings of UA-MT."""

    uamt_passes: Count = setting(8, "Teacher passes from which its uncertainty is computed", symbol="T")
    uamt_threshold: Part = setting(
        0.75,
        "Share of the largest entropy, ln K, above which a voxel is left out at the start; it grows to 1",
        symbol="H",
    )
    uamt_dropout: Decay = setting(
        0.5,
        "Dropout of whole channels before the teacher's head in the passes that measure its uncertainty, because "
        "nnU-Net's networks have none; 0 disables it",
    )


class nnUNetTrainerUAMT(Taught):  # noqa: N801
    """UA-MT: a mean teacher, followed only where Monte Carlo dropout finds it certain.

    The threshold is a share of ln K, and the mean is over the K classes. The released code and all of its ports have
    ln 2 and 2 written out, which with more classes leaves out most of what is not background.
    """

    paper = (
        "Yu et al., Uncertainty-Aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation, "
        "MICCAI 2019"
    )
    Settings = UAMTSettings

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The teacher, with dropout before the head of its highest resolution."""
        modules = super().build_training_modules()
        if self.settings.uamt_dropout:
            teacher: EMATeacher = modules["teacher"]
            self.require_decoder(teacher.network, "to drop channels before, as uamt_dropout asks")
            head = teacher.network.decoder.seg_layers[-1]
            head.register_forward_pre_hook(partial(drop_channels_in_training, self.settings.uamt_dropout))
        return modules

    def consistency(self, images: Tensor) -> Tensor:
        """The squared difference to a pass of the teacher without dropout, where T with it are sure enough."""
        noise = self.settings.teacher_noise
        mean = sum(self.of_teacher(noisy(images, noise)) for _ in range(self.settings.uamt_passes))
        unsure = entropy(mean / self.settings.uamt_passes, self.label_manager.has_regions)
        start = self.settings.uamt_threshold
        sure = unsure < start + (1 - start) * self.rampup(1.0)
        self.log_value("teacher_sure", sure.float().mean())
        teacher: EMATeacher = self.training_modules["teacher"]
        teacher.eval()  # the student has no dropout: with it the target would be wrong at random
        target = self.of_teacher(noisy(images, noise))
        teacher.train()
        squared = (self.of_student(images) - target).square().mean(1)
        return masked_mean(squared, sure)
