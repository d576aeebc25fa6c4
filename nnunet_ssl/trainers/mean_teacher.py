"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.declared import Decay, Share, Weight, declared, setting
from nnunet_ssl.networks.ema import EMATeacher, noisy
from nnunet_ssl.trainers.base import Batch, Stream, nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings


@declared
class TeacherSettings(SSLSettings):
    """Settings of every method with a mean teacher."""

    teacher_weight: Weight = setting(0.1, "Full weight of the consistency with the teacher", symbol="w")
    teacher_rampup: Share = setting(1.0, "Share of the training over which the weight grows")
    teacher_decay: Decay = setting(
        0.99, "Share of its weights that the teacher keeps per step; less in the first steps", symbol="alpha"
    )


@declared
class MeanTeacherSettings(TeacherSettings):
    """Settings of Mean Teacher."""

    teacher_noise: Weight = setting(
        0.1,
        "Standard deviation of the noise on the teacher's images, clipped at twice this value; 0 disables it. Images "
        "are normalized: 0.1 is small",
    )


class WithTeacher(nnUNetTrainerSSL):
    """A method whose student, the plans' network, has an EMA copy of itself; the student predicts."""

    @property
    def teacher_decay(self) -> float:
        """alpha."""
        return self.settings.teacher_decay

    def networks(self) -> dict[str, nn.Module]:
        """The student and its teacher."""
        return {**super().networks(), "teacher": self.training_modules["teacher"]}

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The teacher."""
        teacher = EMATeacher(self.plans_network, self.teacher_decay)
        return {**super().build_training_modules(), "teacher": teacher}

    def start_teacher(self, at: int = 0) -> None:
        """Make the teacher equal to the student in step ``at``; -pretrained_weights are in by the first."""
        if self.global_step == at:
            self.training_modules["teacher"].start(self.plans_network)

    def after_step(self) -> None:
        """The teacher follows."""
        super().after_step()
        self.training_modules["teacher"].update(self.plans_network, self.global_step)


class Taught(WithTeacher):
    """A method whose student follows its teacher on unlabeled images. It writes ``consistency``."""

    Settings = TeacherSettings

    def term_weights(self) -> dict[str, float]:
        """The weight grows along a sigmoid."""
        weight = self.settings.teacher_weight * self.rampup(self.settings.teacher_rampup)
        return {**super().term_weights(), "consistency": weight}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass for the labels, one for what the teacher says of unlabeled images."""
        self.start_teacher()
        yield {"sup": self.loss(self.forward("first", batch.labeled), batch.labeled.target)}
        yield {"consistency": self.consistency(batch.unlabeled.images)}

    def consistency(self, images: Tensor) -> Tensor:
        """How far the student is from its teacher on unlabeled images ``[B, C, *patch]``, 0-dim."""
        raise NotImplementedError

    def of_student(self, images: Tensor) -> Tensor:
        """The student's probabilities ``[B, K, *patch]``, float32."""
        return self.probabilities(self.forward("first", Stream(images, None)))

    @torch.no_grad()
    def of_teacher(self, images: Tensor) -> Tensor:
        """The teacher's probabilities ``[B, K, *patch]``, float32, without gradient."""
        return self.probabilities(self.forward("teacher", Stream(images, None)))


class nnUNetTrainerMeanTeacher(Taught):  # noqa: N801
    """Mean Teacher: the student matches what its EMA copy predicts for the same unlabeled images with other noise.

    The difference is squared and averaged over classes too, as in the ports to segmentation. Teacher and student see
    the same augmented patch: nnU-Net's augmentation is no matter of the method.
    """

    paper = "Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017"
    Settings = MeanTeacherSettings

    def consistency(self, images: Tensor) -> Tensor:
        """The mean of (p_student - p_teacher)^2."""
        target = self.of_teacher(noisy(images, self.settings.teacher_noise))
        return F.mse_loss(self.of_student(images), target)
