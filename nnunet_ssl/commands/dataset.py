"""``nnUNetv2_ssl_dataset``: a published dataset, made into a raw dataset with few labels."""

from __future__ import annotations

import importlib
from argparse import RawDescriptionHelpFormatter

from nnunet_ssl.commands.arguments import NEW_DATASET, Parser, add_shared
from nnunet_ssl.datasets import MADE_UP, PUBLISHED
from nnunet_ssl.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_dataset",
        description="Convert a dataset as published into an nnU-Net raw dataset with few labels, using the "
        "literature's lists of cases. nnUNetv2_ssl_dataset NAME --help lists the files and options of a dataset.",
    )
    parser.add_argument("--list", action="store_true", help="Show the available datasets")
    names = parser.add_subparsers(dest="name", metavar="NAME", help="One of those that --list shows")
    modules = {name: importlib.import_module(f"nnunet_ssl.datasets.{name}") for name in (*PUBLISHED, *MADE_UP)}
    for name, module in modules.items():
        own = names.add_parser(name, description=module.__doc__, formatter_class=RawDescriptionHelpFormatter)
        add_shared(own, "-d", **NEW_DATASET)
        if name in PUBLISHED:
            add_shared(own, "--data", required=True)
            add_shared(own, "-np", default=1, help="Parallel processes. Default: 1")
            text = "Match image and label voxel by voxel, even if their headers differ in position or direction"
            own.add_argument("--trust-voxels", action="store_true", help=text)
        module.add_arguments(own)
    args = parser.parse_args(argv)
    if args.list:
        for name, module in modules.items():
            print(f"{name:<12} {(module.__doc__ or '').splitlines()[0]}")
        return
    if args.name is None:
        raise UserError(f"name a dataset, one of {', '.join(modules)}.")
    modules[args.name].make(args)
