"""``nnUNetv2_ssl_evaluate``: overlap and surface metrics of predictions, and the paired comparison of methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nnunet_ssl.commands.arguments import Parser, add_shared, distance
from nnunet_ssl.errors import UserError
from nnunet_ssl.names import path_component


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    from nnunet_ssl.evaluation.metrics import EMPTY_RULES, METRICS

    parser = Parser(
        prog="nnUNetv2_ssl_evaluate",
        description="Measure Dice, Jaccard and surface metrics of each case and class, and write summary.json, "
        "cases.csv and summary.md. With several -pred, also compare each with the first, case by case.",
    )
    parser.add_argument("-ref", required=True, metavar="DIR", help="Folder of the true label maps")
    parser.add_argument(
        "-pred", required=True, nargs="+", metavar="DIR",
        help="Folders of predicted label maps, one per method; the first is the baseline",
    )  # fmt: skip
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="Names of the methods. Default: the names of the folders"
    )
    parser.add_argument(
        "-djfile", metavar="FILE",
        help="File dataset.json. Default: the one next to the folder of the truth, in it, or with the predictions",
    )  # fmt: skip
    add_shared(
        parser, "-o",
        help="Folder to write to. Default: the folder of the predictions. A comparison requires it, and each method "
        "gets a folder in it",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, metavar="METRIC", default=list(METRICS),
        help=f"Any of {' '.join(METRICS)}. Default: all",
    )  # fmt: skip
    parser.add_argument("--spacing", choices=("mm", "voxel"), default="mm", help="Unit of distances. Default: mm")
    parser.add_argument(
        "--tolerance", type=distance, metavar="X", default=1.0,
        help="Tolerance of NSD, in the unit of the distances. Default: 1",
    )  # fmt: skip
    parser.add_argument(
        "--empty", choices=EMPTY_RULES, default="nan",
        help="Value of an empty prediction or truth. Default: nan. "
        + " ".join(f"With {name}: {rule.meaning}" for name, rule in EMPTY_RULES.items()),
    )  # fmt: skip
    parser.add_argument(
        "--groups", metavar="FILE",
        help='JSON file {"group": [labels or names of classes]}. Default: class_groups in dataset.json',
    )  # fmt: skip
    parser.add_argument("--chill", action="store_true", help="Evaluate the cases that every folder has; name the rest")
    add_shared(parser, "--seed", help="Seed of the bootstrap. Default: 0")
    add_shared(parser, "-np")
    args = parser.parse_args(argv)
    names = method_names(args.pred, args.names)
    if len(names) > 1 and args.folder is None:
        raise UserError("with several -pred, name a folder for the comparison with -o.")

    # heavy: only once the arguments are known to be good
    from nnunetv2.configuration import default_num_processes

    from nnunet_ssl.evaluation.classes import read_dataset
    from nnunet_ssl.evaluation.folders import evaluate_folders
    from nnunet_ssl.evaluation.metrics import Options
    from nnunet_ssl.evaluation.summary import Evaluation, summary_markdown, write_summary
    from nnunet_ssl.files import writing

    dataset = read_dataset(args.ref, args.pred, args.djfile, args.groups)
    options = Options(tuple(m for m in METRICS if m in args.metrics), args.spacing == "mm", args.tolerance, args.empty)
    folders = dict(zip(names, args.pred, strict=True))
    cases = evaluate_folders(args.ref, folders, dataset, options, args.processes or default_num_processes, args.chill)
    evaluations = [Evaluation(name, cases, dataset, options) for name in names]
    with writing("Make room, or name another folder with -o."):
        for evaluation in evaluations:
            own = folders[evaluation.method] if args.folder is None else args.folder
            write_summary(evaluation, own if len(names) == 1 else os.path.join(own, evaluation.method))
        if len(names) > 1:
            from nnunet_ssl.evaluation.compare import write_comparison  # pandas takes half a second

            text = write_comparison(evaluations, args.folder, args.seed)
        else:
            text = summary_markdown(evaluations[0])
    print(text)
    print(f"Wrote {args.folder or args.pred[0]}")


def method_names(predictions: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """One name a method: those given, or the folders' own, or their paths where these are the same.

    Raises:
        UserError: too few or too many, one twice, or one that cannot name a folder.
    """
    if names is None:
        names = [os.path.basename(os.path.abspath(folder)) for folder in predictions]
        paths = [Path(os.path.abspath(folder)).parts[1:] for folder in predictions]
        for length in range(2, max(map(len, paths)) + 1):
            if len(set(names)) < len(names):  # by as much of their paths as tells them apart
                names = ["_".join(path[-length:]) for path in paths]
    if len(names) != len(predictions):
        raise UserError(
            f"--names gives {len(names)} name(s) for {len(predictions)} folder(s). Give one for each -pred."
        )
    for name in names:
        path_component(name, "method", "--names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise UserError(f"two methods are named {twice}. Tell them apart with --names.")
    return list(names)
