"""``nnUNetv2_ssl_demo``: the whole way on made-up data, from raw images to a table of Dice and a figure."""

from __future__ import annotations

from pathlib import Path

from nnunet_ssl.commands.arguments import Parser, add_shared, count, find_device


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_demo",
        description="Make a small dataset of five organs with few labels, train nnUNetTrainerLabeledOnly and "
        "nnUNetTrainerWarps on it from the same seed with nnU-Net's own commands, and compare them on test cases. "
        "Takes about 25 minutes on two CPU cores. A stopped demo resumes where it was.",
    )
    add_shared(parser, "-o", default=Path("demo"), help="Folder to write to. Default: demo")
    parser.add_argument(
        "--epochs", type=count, default=60, metavar="N", help="Epochs of each training, of 100 steps each. Default: 60"
    )
    add_shared(parser, "-device")
    add_shared(parser, "--seed", help="Seed of the dataset and of both trainings. Default: 0")
    add_shared(parser, "--dry-run", "--device", "--dir")
    args = parser.parse_args(argv)

    # heavy: only once the arguments are known to be good
    from nnunet_ssl.demo.run import Demo

    demo = Demo(args.folder.resolve(), args.epochs, find_device(args.device), args.seed)
    if args.dry_run:
        demo.dry_run()
    else:
        demo.run()
