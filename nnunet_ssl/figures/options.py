"""What all figures are told: the classes, how to predict, and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.classes import classes_of
from nnunet_ssl.evaluation.metrics import Label
from nnunet_ssl.figures.page import class_colors


class NotApplicable(UserError):  # noqa: N818 - says what it is
    """These runs cannot give this figure: skipped, unless it was asked for."""


@dataclass(frozen=True)
class FigureOptions:
    """What all figures are told."""

    dataset_json: dict[str, Any]  # from the raw dataset
    labels: dict[str, Label]  # name -> label, or labels of a region; without background and ignore label
    classes: list[Label]  # the ``labels`` that are drawn
    device: str = "cpu"  # or cuda, mps
    tta: bool = True  # predict with nnU-Net's mirroring
    num_processes: int = 1  # at most
    seed: int = 0  # of everything random
    embedding: tuple[str, ...] = ("pca", "tsne")
    dataset: str = ""  # name of the raw dataset's folder

    @property
    def names(self) -> dict[Label, str]:
        """The chosen classes with their names, in the dataset's order."""
        return {label: name for name, label in self.labels.items() if label in self.classes}

    @property
    def colors(self) -> dict[Label, str]:
        """A color for each chosen class, the same in all figures."""
        return dict(zip(self.names, class_colors(len(self.names)), strict=True))

    @property
    def ignore_label(self) -> int | None:
        """Of voxels that nobody labeled."""
        return self.dataset_json["labels"].get("ignore")

    @property
    def file_ending(self) -> str:
        """For instance ``.nii.gz``."""
        return self.dataset_json["file_ending"]


def find_classes(
    dataset_json: dict[str, Any], chosen: Sequence[str] | None = None
) -> tuple[dict[str, Label], list[Label]]:
    """``labels`` and ``classes`` of :class:`FigureOptions`, of those ``chosen`` by label or name; None for all.

    Raises:
        UserError: a name or label that the dataset does not have, or labels that nnU-Net does not accept.
    """
    labels = {name: label for label, name in classes_of(dataset_json, "dataset.json")[0].items()}
    by_text = {str(label): label for label in labels.values()} | labels
    for text in chosen or ():
        if text not in by_text:
            known = ", ".join(f"{label} ({name})" for name, label in labels.items())
            raise UserError(f"--classes {text} is not a class of this dataset; the classes are {known}.")
    wanted = set(labels.values()) if chosen is None else {by_text[text] for text in chosen}
    return labels, [label for label in labels.values() if label in wanted]
