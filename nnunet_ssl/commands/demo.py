"""``nnUNetv2_ssl_demo``: the whole way on made-up data, from raw images to a table of Dice and a figure."""

from __future__ import annotations

from pathlib import Path

from nnunet_ssl.commands.arguments import Parser, count, seed
from nnunet_ssl.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: arguments without the program's name; ``sys.argv`` when None.
    """
    parser = Parser(
        prog="nnUNetv2_ssl_demo",
        description="Make a small dataset of five organs with few labels, train nnUNetTrainerLabeledOnly and "
        "nnUNetTrainerWarps on it from the same seed with nnU-Net's own commands, and compare them on test cases. "
        "About ten minutes on two CPU cores. A stopped demo goes on where it was.",
    )
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="Folder for all of it. Default: demo")
    parser.add_argument("--epochs", type=count, default=20, help="Epochs of 50 steps for each training. Default: 20")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="Default: cuda where there is a GPU, else cpu")
    parser.add_argument("--seed", type=seed, default=0, help="Of the dataset and of both trainings. Default: 0")
    args = parser.parse_args(argv)

    # heavy: only once the arguments are known to be good
    import torch

    from nnunet_ssl.demo.run import Demo

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave --device out to use the CPU.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    Demo(args.dir.resolve(), args.epochs, device, args.seed).run()


if __name__ == "__main__":
    main()
