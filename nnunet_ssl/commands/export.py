"""``nnUNetv2_ssl_export``: hand a trained model on as a model of plain nnU-Net."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile

from nnunet_ssl.commands.arguments import Parser, add_shared
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import writing


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_export",
        description="Write a trained model as a plain nnUNetTrainer model: CPU tensors, no optimizer, logits verified "
        "to be equal. Predicting with it does not need this package.",
    )
    add_shared(parser, "-d", "-c")
    add_shared(
        parser, "-f", dest="folds", metavar="FOLD", nargs="+", default=["0", "1", "2", "3", "4"],
        help="Folds: numbers, or all. Default: 0 1 2 3 4",
    )  # fmt: skip
    add_shared(parser, "-tr", "-p", "-chk")
    add_shared(parser, "-o", required=True, help="Folder to write to; must be empty or not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--both",
        action="store_true",
        help="Export both networks of a trainer with two as two folds, to average",
    )
    which.add_argument("--branch", choices=("high",), help="Export only this branch of SASNet")
    parser.add_argument("--zip", action="store_true", help="Also write DIR.zip, for nnU-Net to install")
    args = parser.parse_args(argv)

    folds = [f if f == "all" else int(f) for f in args.folds]
    zip_base = os.path.normpath(args.folder)
    if args.zip and os.path.exists(zip_base + ".zip"):
        raise UserError(f"{zip_base}.zip exists already. Remove it, or name another folder with -o.")
    from nnunet_ssl.export import export_model  # torch is heavy: only once the arguments are known to be good

    model, exported = export_model(
        args.dataset, args.configuration, folds, str(args.folder), args.trainer, args.plans, args.checkpoint, args.both,
        args.branch,
    )  # fmt: skip
    part = f"{args.branch} branch" if args.branch else "network"
    for each in exported:
        name = f"{each.network} {part}" if args.both else part
        print(f"fold_{each.fold}: the {name} of fold {each.source_fold}, verified")
    print(f"Wrote {model}")
    folds_there = [str(each.fold) for each in exported]
    command = ["nnUNetv2_predict_from_modelfolder", "-m", str(model), "-f", *folds_there, "-i", "IN", "-o", "OUT"]
    print(f"  {shlex.join(command)}")
    if args.zip:
        archive = zip_base + ".zip"
        with (
            writing(f"{args.folder} is complete. To have it as a zip, too, make room, remove it and export again."),
            tempfile.TemporaryDirectory(dir=os.path.dirname(archive) or ".") as temporary,
        ):
            os.replace(shutil.make_archive(os.path.join(temporary, "model"), "zip", root_dir=args.folder), archive)
        print(f"Wrote {archive}\n  {shlex.join(['nnUNetv2_install_pretrained_model_from_zip', archive])}")
