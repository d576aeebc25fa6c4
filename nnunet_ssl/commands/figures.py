"""``nnUNetv2_ssl_figures``: the pictures of a paper, from trained models."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_ssl.commands.arguments import Parser, add_shared, find_device
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import writing

FIGURES = {  # and where each is drawn, below nnunet_ssl/figures
    "cases": "cases",
    "entropy": "shta.entropy",
    "tokens": "shta.tokens",
    "assignment": "shta.assignment",
    "curves": "curves",
    "boxes": "boxes",
}
FROM_PREDICTIONS = {"cases": 1, "entropy": 2, "boxes": 1}  # of so many models at least
EMBEDDINGS = ("pca", "tsne")
REMEDY = "Make room, make it writable, or name another folder with -o."


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_figures",
        description="Draw the figures that a paper shows of trained models: cases, entropy, tokens, assignment, "
        "curves, boxes. Each figure is a PNG, a PDF and a caption. nnU-Net predicts the test cases that have a truth; "
        "if there are none, the validation cases of the fold are shown.",
    )
    add_shared(parser, "-d")
    add_shared(parser, "-c", required=False)
    add_shared(parser, "-f")
    models = parser.add_mutually_exclusive_group(required=True)
    add_shared(
        models, "-tr", dest="trainers", metavar="TRAINER", nargs="+", required=False,
        help="Trainers of the models; the first is the baseline",
    )  # fmt: skip
    models.add_argument(
        "-m", dest="models", nargs="+", type=Path, metavar="DIR",
        help="Folders of the models, instead of -tr, -c and -p; the first is the baseline",
    )  # fmt: skip
    add_shared(parser, "-p", "-chk")
    parser.add_argument(
        "-pred", nargs="+", type=Path, metavar="DIR",
        help="Folders of predicted label maps, one per model. Default: nnU-Net predicts what is missing",
    )  # fmt: skip
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="Names of the models in the figures. Default: the trainers' names"
    )
    add_shared(parser, "-o", required=True)
    parser.add_argument(
        "--which", nargs="+", choices=FIGURES, metavar="FIGURE",
        help=f"Any of {' '.join(FIGURES)}. Default: all that these models allow",
    )  # fmt: skip
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="Labels or names of classes. Default: all except the background"
    )
    parser.add_argument(
        "--embedding", nargs="+", choices=EMBEDDINGS, metavar="KIND", default=list(EMBEDDINGS),
        help=f"Two-dimensional layout of the tokens, any of {' '.join(EMBEDDINGS)}. Default: both",
    )  # fmt: skip
    add_shared(parser, "-device", "--disable_tta")
    add_shared(parser, "--seed", help="Seed of t-SNE, the bootstrap and every other random choice. Default: 0")
    add_shared(parser, "-np")
    args = parser.parse_args(argv)

    if args.trainers and args.configuration is None:
        raise UserError("-tr needs -c, the configuration that was trained, for instance -c 3d_fullres.")

    # heavy: only once the arguments are known to be good
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    from nnunet_ssl.figures.options import FigureOptions, find_classes
    from nnunet_ssl.figures.predictions import with_given_predictions
    from nnunet_ssl.figures.runs import find_runs, refuse_other_labels
    from nnunet_ssl.figures.test_set import find_cases
    from nnunet_ssl.unlabeled.find import read_dataset_json, required_folder, resolve_dataset

    device = find_device(args.device)
    dataset = resolve_dataset(args.dataset)
    if args.trainers:
        required_folder("nnUNet_results")
        folders = [
            Path(get_output_folder(dataset, trainer, args.plans, args.configuration)) for trainer in args.trainers
        ]
    else:
        folders = args.models
    runs = find_runs(folders, args.fold, args.checkpoint, args.names, "-tr" if args.trainers else "-m")
    cases = find_cases(args.dataset, args.fold)
    dataset_json = read_dataset_json(str(Path(required_folder("nnUNet_raw")) / dataset))
    refuse_other_labels(runs, dataset_json)
    labels, classes = find_classes(dataset_json, args.classes)
    options = FigureOptions(
        dataset_json=dataset_json,
        labels=labels,
        classes=classes,
        device=device,
        tta=args.mirroring,
        num_processes=args.processes or default_num_processes,
        seed=args.seed,
        embedding=tuple(e for e in EMBEDDINGS if e in args.embedding),
        dataset=dataset,
    )
    if args.pred:
        runs = with_given_predictions(runs, args.pred, cases, options)
    with writing(REMEDY):
        args.folder.mkdir(parents=True, exist_ok=True)
        draw_figures(args.which, runs, cases, args.folder, options)


def draw_figures(which: list[str] | None, runs: list, cases: list, out: Path, options: object) -> None:
    """Draw one figure after the other; what goes wrong with one does not stop the others.

    What an earlier call has drawn of these figures is removed first: what lies there afterwards is of this call.
    ``which`` are of ``FIGURES``; None for all that these runs can give.

    Raises:
        UserError: after all others are drawn, says which are not, and why.
    """
    from nnunet_ssl.figures.predictions import with_predictions

    figures = [figure for figure in FIGURES if which is None or figure in which]
    failed: dict[str, str] = {}  # figure -> why
    for figure in figures:
        _remove_old(out, figure)
    # once for all: what cannot be predicted is not tried again for each figure
    if predicted := [figure for figure in figures if len(runs) >= FROM_PREDICTIONS.get(figure, len(runs) + 1)]:
        with _noting(predicted, failed):
            runs = with_predictions(runs, cases, out, options)
    for figure in [figure for figure in figures if figure not in failed]:
        with _noting([figure], failed, skip=which is None):
            module = importlib.import_module(f"nnunet_ssl.figures.{FIGURES[figure]}")
            getattr(module, f"draw_{figure}")(runs, cases, out, options)
            print(f"Wrote {figure} to {out}", flush=True)
    if failed:
        reasons = {reason: ", ".join(f for f in failed if failed[f] == reason) for reason in failed.values()}
        lines = [f"\n  {names}: {reason}" for reason, names in reasons.items()]
        raise UserError(f"{len(failed)} figure(s) could not be drawn." + "".join(lines))


@contextmanager
def _noting(figures: list[str], failed: dict[str, str], skip: bool = False) -> Iterator[None]:
    """Note what goes wrong with figures, and go on; ``skip`` those that these runs cannot give."""
    from nnunet_ssl.figures.options import NotApplicable

    try:
        with writing(REMEDY):
            yield
    except UserError as error:
        reason = str(error).removeprefix("nnunet_ssl: ")
        if skip and isinstance(error, NotApplicable):
            print(f"Skipped {', '.join(figures)}: {reason}", flush=True)
        else:
            failed.update(dict.fromkeys(figures, reason))
    except Exception as error:
        traceback.print_exc()
        failed.update(dict.fromkeys(figures, f"{type(error).__name__}: {error}"))


def _remove_old(out: Path, figure: str) -> None:
    """Remove a figure's files; pictures of cases have the class in their names."""
    for kind in ("png", "pdf", "md"):
        for file in out.glob("cases_[0-9]*." + kind if figure == "cases" else f"{figure}.{kind}"):
            file.unlink()
