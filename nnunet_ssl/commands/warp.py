"""``nnUNetv2_ssl_warp``: warp labeled images into the shapes of unlabeled ones, before training."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_ssl.commands.arguments import Parser, add_shared, count, whole
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import writing
from nnunet_ssl.names import a_few


def channel(text: str) -> tuple[int, ...]:
    """The number of a channel, or nothing for ``all``."""
    return () if text == "all" else (whole(text),)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_warp",
        description="Register labeled images onto unlabeled ones, and save them warped together with their labels, "
        "for nnUNetTrainerWarps and every trainer whose setting warped_share is above 0. Training would do this "
        "itself; run it ahead to see a picture of the result. Only new and changed warps are made.",
    )
    add_shared(parser, "-d", "-c", "-p")
    parser.add_argument(
        "--onto", choices=("unlabeled", "labeled"), default="unlabeled",
        help="The images to register onto: those in imagesUn, or the labeled ones themselves, for trainings whose "
        "setting warp_onto is labeled. Default: unlabeled",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", type=count, metavar="N",
        help="Warps per labeled case. Default: 30, or as many as fit into ten minutes",
    )  # fmt: skip
    parser.add_argument(
        "--groups", type=Path, metavar="FILE",
        help='JSON file {"case": "patient"}, if patients have several cases: no fold trains with warps onto images of '
        "a patient in its validation cases or the test cases. It is kept, and used in addition to the dataset's "
        "groups.json",
    )  # fmt: skip
    parser.add_argument(
        "--channel", type=channel, metavar="K",
        help='Channel that registration compares: a number from 0, or all. Default: as in an earlier call, or all',
    )  # fmt: skip
    add_shared(parser, "-np")
    args = parser.parse_args(argv)

    # heavy: only once the arguments are known to be good
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from nnunet_ssl.figures.warps import draw_warps
    from nnunet_ssl.shapes.warped import prepare_warps
    from nnunet_ssl.shapes.wish import Wish, labeled_images
    from nnunet_ssl.unlabeled.case import Preparation
    from nnunet_ssl.unlabeled.find import (
        channel_names,
        read_dataset_json,
        read_plans,
        required_folder,
        resolve_dataset,
    )
    from nnunet_ssl.unlabeled.folds import SPLITS, trained_with
    from nnunet_ssl.unlabeled.groups import read_groups
    from nnunet_ssl.unlabeled.prepare import prepare_unlabeled

    dataset = resolve_dataset(args.dataset)
    preprocessed = os.path.join(required_folder("nnUNet_preprocessed"), dataset)
    file = os.path.join(preprocessed, f"{args.plans}.json")
    plans_manager = read_plans(file, "Run nnUNetv2_plan_and_preprocess, or name the plans with -p.", args.configuration)
    dataset_json = read_dataset_json(preprocessed)
    channels = len(channel_names(dataset_json))
    if args.channel and args.channel[0] >= channels:
        raise UserError(f"--channel {args.channel[0]}: the channels of {dataset} are 0 to {channels - 1}.")
    if args.channel and channels == 1:
        args.channel = ()  # is all of them
    groups = read_groups(args.groups) if args.groups else None
    processes = args.processes or default_num_processes
    what = (dataset, plans_manager.plans, args.configuration, dataset_json)
    task = Preparation(*what)
    folder = task.labeled_folder
    labeled = sorted(infer_dataset_class(folder).get_identifiers(folder)) if os.path.isdir(folder) else []
    if not labeled:
        raise UserError(f"{folder} has no labeled cases. {task.again}.")
    trained = sorted(trained_with(preprocessed)) or labeled  # cases that are only validated with: not needed
    if lost := sorted(set(trained) - set(labeled)):
        split = os.path.join(preprocessed, SPLITS)
        problem = f"{split} names {a_few(lost)}, but {folder} has no such case"
        raise UserError(f"{problem}. {task.again}, or remove the split.")
    if args.onto == "labeled":
        onto = labeled_images(task, labeled)
    else:
        onto = prepare_unlabeled(
            dataset, plans_manager, args.configuration, dataset_json, labeled, processes, reading=True
        )
    wish = Wish(*what, tuple(trained), (), onto, args.pairs, groups, args.channel)
    warps = prepare_warps(wish, processes)
    with writing("The warps are complete; make room or make the folder writable for their picture."):
        picture = draw_warps(wish)
    print(f"{args.configuration}: {len(warps.cases)} warps are ready in {warps.folder}; look at {picture}")
