"""ICT: Interpolation Consistency Training (Verma et al., IJCAI 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.declared import Positive, declared, setting
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.mean_teacher import Taught, TeacherSettings


@declared
class ICTSettings(TeacherSettings):
    """Settings of ICT."""

    ict_beta: Positive = setting(
        0.2,
        "Both parameters of the Beta distribution of the shares: below 1, most mixes are nearly one image",
        symbol="alpha",
    )


class nnUNetTrainerICT(Taught):  # noqa: N801
    """ICT: on a mix of two unlabeled images, the student predicts the same mix of the teacher's two predictions.

    Images are mixed in pairs of a batch, after nnU-Net's augmentation, each pair with its own share; of an odd
    number the last is left out. The port that papers compare with takes the first two images of a batch of any
    size.

    Raises:
        UserError: at the start, if a batch has a single image.
    """

    paper = "Verma et al., Interpolation Consistency Training for Semi-Supervised Learning, IJCAI 2019"
    Settings = ICTSettings

    def initialize(self) -> None:
        """As the base; images are mixed in pairs."""
        super().initialize()
        if self.batch_size < 2:
            raise UserError(
                f"{type(self).__name__} mixes pairs of images, and a batch of '{self.configuration_name}' in "
                f"{self.plans_manager.plans_name} has {self.batch_size} on this GPU; use plans with at least two, or "
                "nnUNetTrainerMeanTeacher."
            )

    def consistency(self, images: Tensor) -> Tensor:
        """The mean of (p_student(mix of images) - mix of p_teacher(images))^2."""
        pairs = len(images) // 2
        one, other = images[:pairs], images[pairs : 2 * pairs]
        beta = torch.full((pairs, *[1] * (images.ndim - 1)), self.settings.ict_beta)
        share = torch.distributions.Beta(beta, beta, validate_args=False).sample().to(images.device, non_blocking=True)
        of_one, of_other = self.of_teacher(images[: 2 * pairs]).split(pairs)
        return F.mse_loss(self.of_student(torch.lerp(one, other, share)), torch.lerp(of_one, of_other, share))
