"""The hippocampus data of ``docs/results.md`` as an nnU-Net raw dataset with few labels.

    python scripts/prepare_hippocampus.py --data DIR --seed 0 --labeled 5 -d 640
    python scripts/prepare_hippocampus.py --data DIR --labeled all -d 649

DIR holds ``images/`` and ``labels/`` (same file names, NIfTI) and ``protocol.json`` with ``train``, ``test`` and
``labelled_order``, one order of the training cases a seed. The first n cases of an order go to ``imagesTr`` and
``labelsTr``, the rest to ``imagesUn`` without their labels, the test cases to ``imagesTs`` and ``labelsTs``.

The protocol has no validation set, so ``splits_final.json`` gives one fold that trains on all labelled cases and
validates on the first five of them: nnU-Net wants some, and nothing is chosen by them.

Every file that is used is read and checked before anything is written, and the dataset appears under its name only
when it is complete. Labels of unlabelled cases are not used.
"""

from __future__ import annotations

from raw_dataset import Recipe, from_protocol

RECIPE = Recipe(
    labels={"background": 0, "anterior": 1, "posterior": 2},
    channel="MRI",
    reference="Medical Segmentation Decathlon, task 4",
    licence="CC-BY-SA 4.0",
)


def main(argv: list[str] | None = None) -> None:
    """Check the data, then write the dataset and its one fold."""
    from_protocol(argv, __doc__, "Hippocampus", "5", RECIPE)


if __name__ == "__main__":
    main()
