"""ABD: Adaptive Bidirectional Displacement (Chi et al., CVPR 2024), on two networks that teach each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from torch import Tensor

from nnunet_ssl.declared import Share, Weight, declared, setting
from nnunet_ssl.losses.cubes import partition, recover
from nnunet_ssl.losses.displacement import CellScores, cell_counts, cell_scores, put, reliable_match, take
from nnunet_ssl.losses.squared_dice import squared_dice_of_shown
from nnunet_ssl.trainers.base import Batch, Stream, full_resolution
from nnunet_ssl.trainers.cps import TwinSettings, nnUNetTrainerCPS
from nnunet_ssl.trainers.strong_view import StronglyViewed, StrongViewSettings


@declared
class ABDSettings(StrongViewSettings, TwinSettings):
    """Settings of ABD."""

    cps_weight: Weight = setting(0.2, "Full weight of the cross terms", symbol="w")
    cps_rampup: Share = setting(1.0, "Share of the training over which that weight grows")
    abd_labeled_weight: Weight = setting(2.0, "Weight of displaced labeled images", symbol="s")
    abd_labeled_share: Share = setting(0.667, "Share of the training after which there are none")
    abd_labeled_probability: Share = setting(0.5, "Probability that the cells of a labeled image are displaced")


class nnUNetTrainerABD(StronglyViewed, nnUNetTrainerCPS):  # noqa: N801
    """ABD: two networks see a weak and a strong view, and then images with cells exchanged between the two.

    The first network, which predicts, sees the weak view. Of an unlabeled image the cell of which one network is least
    sure is taken by a cell of the other view of which the other network is sure and says something alike. Of a labeled
    image what neither is sure of takes the place of what both know, labels with it. The networks teach each other on
    unlabeled images as they are and displaced, by the Dice loss of hard pseudo-labels.
    """

    paper = "Chi et al., Adaptive Bidirectional Displacement for Semi-Supervised Medical Image Segmentation, CVPR 2024"
    Settings = ABDSettings
    crosses_labeled = False

    def initialize(self) -> None:
        """As CPS; and the cells, with how sure each network is of them."""
        super().initialize()
        self._sure: dict[str, CellScores] = {}
        self.cells = cell_counts(self.configuration_manager.patch_size)
        self.print_to_log_file(f"ABD: {' x '.join(map(str, self.cells))} cells")

    @property
    def displaces_labeled(self) -> bool:
        """Whether there are displaced labeled images at this step."""
        settings = self.settings
        return settings.abd_labeled_weight > 0 and self.global_step < settings.abd_labeled_share * self.total_steps

    def term_weights(self) -> dict[str, float]:
        """w grows along a sigmoid; s is constant, then 0."""
        displaced = self.settings.abd_labeled_weight if self.displaces_labeled else 0.0
        return {**super().term_weights(), "displaced": displaced}

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """A pass of each network on labeled images, on displaced ones, then on unlabeled and on displaced ones.

        A term of displaced images is the mean over the two displaced views.
        """
        labeled, unlabeled = batch
        views = self._views(labeled.images, "labeled")
        yield from self.in_turn(*(labeled._replace(images=images) for images in views.values()))
        if self.displaces_labeled:
            for images, target in self._displaced_labeled(views, full_resolution(labeled.target)):
                targets = self._scaled(target)
                for name in views:  # no stream of its own: what hangs on labeled features is there already
                    yield {"displaced": self.loss(self.forward(name, Stream(images, None)), targets) / 2}

        views = self._views(unlabeled.images, "unlabeled")
        yield from self.in_turn(*(Stream(images, None) for images in views.values()))
        for images in self._displaced_unlabeled(views):
            for terms in self.in_turn(Stream(images, None), Stream(images, None)):
                yield {name: term / 2 for name, term in terms.items()}

    def _views(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """What each network sees."""
        return {"first": images, "second": self.strong_view(images, self.draws("abd", kind))}

    def _terms(
        self, supervised: str, stream: Stream, outputs: list[Tensor] | Tensor, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """As CPS; how sure the network is of each cell is kept."""
        scores = cell_scores(full_resolution(outputs), self.cells, self.label_manager.has_regions)
        self._sure["first" if supervised == "sup" else "second"] = scores
        return super()._terms(supervised, stream, outputs, labels)

    def _cross_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The Dice loss with pseudo-labels, at full resolution."""
        regions = self.label_manager.has_regions
        labels = labels[:, : logits.shape[1]]  # without the channel of what is ignored
        return squared_dice_of_shown(logits, labels, regions=regions)

    def _displaced_unlabeled(self, views: dict[str, Tensor]) -> list[Tensor]:
        """Both views with the cell of which their network is least sure taken from the other view."""
        regions = self.label_manager.has_regions
        first, second = (partition(views[name], self.cells) for name in ("first", "second"))
        unsure, reliable = reliable_match(self._sure["first"], self._sure["second"], regions)
        first = put(first, unsure, take(second, reliable))
        unsure, reliable = reliable_match(self._sure["second"], self._sure["first"], regions)
        second = put(second, unsure, take(first, reliable))
        return [recover(cells, self.cells) for cells in (first, second)]

    def _displaced_labeled(self, views: dict[str, Tensor], target: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Both views, and their targets, with the cell of which their network is surest taken from the other view."""
        coins = self.draws("abd", "coins").random(len(target)) < self.settings.abd_labeled_probability
        chosen = torch.from_numpy(coins).to(target.device, non_blocking=True)
        cells = {name: [partition(images, self.cells), partition(target, self.cells)] for name, images in views.items()}
        for name, other in (("first", "second"), ("second", "first")):  # one after the other, as in the code
            sure, unsure = self._sure[name].confidence.argmax(1), self._sure[other].confidence.argmin(1)
            cells[name] = [
                put(own, sure, take(its, unsure), chosen) for own, its in zip(cells[name], cells[other], strict=True)
            ]
        return [(recover(images, self.cells), recover(labels, self.cells)) for images, labels in cells.values()]

    def _scaled(self, target: Tensor) -> list[Tensor] | Tensor:
        """A target at full resolution as nnU-Net's loader scales it for deep supervision."""
        if not self.enable_deep_supervision:
            return target
        scales = DownsampleSegForDSTransform(self._get_deep_supervision_scales())
        scaled = scales(segmentation=target.flatten(0, 1))["segmentation"]  # each is a channel to it
        return [part.unflatten(0, target.shape[:2]) for part in scaled]
