"""The left atrium data as an nnU-Net raw dataset with few labels.

    python scripts/prepare_la.py --data DIR --labeled 8 -d 650
    python scripts/prepare_la.py --data DIR --labeled all -d 659

DIR is laid out as ``prepare_hippocampus.py`` takes it: ``images/``, ``labels/`` and ``protocol.json``.
"""

from __future__ import annotations

import prepare_hippocampus

LABELS = {"background": 0, "left atrium": 1}


def main(argv: list[str] | None = None) -> None:
    """Check the data, then write the dataset and its one fold."""
    prepare_hippocampus.main(argv, title="LA", labels=LABELS, reference="2018 Atrial Segmentation Challenge")


if __name__ == "__main__":
    main()
