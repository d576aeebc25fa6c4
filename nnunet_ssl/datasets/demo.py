"""The demo's made-up anatomy, five organs, with the labels of all its 55 cases.

    nnUNetv2_ssl_dataset demo -d 1

The cases are the same as in ``nnUNetv2_ssl_demo`` with seed 0. It needs no data; ``nnUNetv2_ssl_split`` hides
labels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_ssl.demo.dataset import LABELED, TEST, UNLABELED, write_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no further options."""


def make(args: argparse.Namespace) -> None:
    """Draw the cases.

    Raises:
        UserError: the id is taken, or the dataset cannot be written.
    """
    # heavy: only once the arguments are known to be good
    from nnunet_ssl.unlabeled.find import required_folder
    from nnunet_ssl.unlabeled.raw_dataset import refuse_existing

    raw, name = Path(required_folder("nnUNet_raw")), f"Dataset{args.target_id:03d}_SSLDemoAllLabels"
    refuse_existing(args.target_id, option="-d")
    write_dataset(raw, seed=0, labeled=LABELED + UNLABELED + TEST, unlabeled=0, test=0, name=name)
    print(f"{raw / name}: {LABELED + UNLABELED + TEST} labeled cases")
