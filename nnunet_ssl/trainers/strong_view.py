"""What methods with strong views share: their settings, and the view for these plans."""

from __future__ import annotations

from nnunet_ssl.declared import Share, Weight, declared, setting
from nnunet_ssl.trainers.base import nnUNetTrainerSSL
from nnunet_ssl.trainers.settings import SSLSettings
from nnunet_ssl.views.strong import StrongView


@declared
class StrongViewSettings(SSLSettings):
    """Settings of every method with a strong view."""

    strong_jitter: Share = setting(0.8, "Probability each of brightness, contrast and gamma in a strong view")
    strong_strength: Weight = setting(
        0.5,
        "How much: brightness moves by up to so many standard deviations of the patch, contrast and gamma are at most "
        "1 + this, or its inverse",
    )
    strong_blur: Share = setting(0.5, "Probability of blur in a strong view")
    strong_noise: Share = setting(0.2, "Probability each of noise and of low resolution in a strong view", paper=0.0)


class StronglyViewed(nnUNetTrainerSSL):
    """A method that makes strong views of the loader's patches, which are the weak ones: ``self.strong_view``.

    Where nnU-Net's augmentation keeps to the plane, since slices are thick, so do blur and low resolution. What a mask
    of the normalization sets to 0 stays 0.
    """

    Settings = StrongViewSettings

    def initialize(self) -> None:
        """As the base; and the view."""
        super().initialize()
        settings = self.settings
        dummy_2d = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[1]
        self.strong_view = StrongView(
            settings.strong_jitter,
            settings.strong_strength,
            settings.strong_blur,
            settings.strong_noise,
            axes=(1, 2) if dummy_2d else None,
            zero_outside=tuple(self.configuration_manager.use_mask_for_norm),
        )
