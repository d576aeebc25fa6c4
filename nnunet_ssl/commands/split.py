"""``nnUNetv2_ssl_split``: hide most labels of a labeled dataset, to learn from it as if it had few."""

from __future__ import annotations

from nnunet_ssl.commands.arguments import NEW_DATASET, Parser, add_shared


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_split",
        description="Make a second raw dataset, of links, in which few cases have labels and the rest are unlabeled. "
        "N is a number of cases, a fraction of all cases except test cases (0.1), or a file with one case per line. "
        "If the dataset has a groups.json, numbers and fractions count patients. "
        "With one seed, a larger labeled set contains the smaller ones.",
    )
    add_shared(parser, "-d", help="Name or id of the labeled dataset")
    add_shared(parser, "-o", **NEW_DATASET)
    parser.add_argument("--labeled", required=True, metavar="N", help="Cases that keep their label")
    parser.add_argument("--val", metavar="N", help="Validation cases. Default: validate on the labeled cases")
    parser.add_argument("--test", metavar="FILE", help="File that lists the test cases, for imagesTs and labelsTs")
    parser.add_argument("--name", help="Name of the new dataset, without its id. Default: <old name>_<n>labeled")
    add_shared(parser, "--copy")
    add_shared(parser, "--seed", help="Seed of the order of the cases. Default: 0")
    args = parser.parse_args(argv)

    from nnunet_ssl.unlabeled.split import split_dataset  # heavy: only once the arguments are known to be good

    name, split = split_dataset(
        args.dataset, args.target_id, args.labeled, args.val, args.test, args.seed, args.copy, args.name
    )
    print(f"{name}: {len(split.labeled)} labeled, {len(split.validation)} validation, "
          f"{len(split.unlabeled)} unlabeled and {len(split.test)} test cases")  # fmt: skip
    if not split.validation:
        print("No --val: the labeled cases also serve as validation cases, because nnU-Net needs some.")
    if not split.unlabeled:
        print("No unlabeled case is left: only trainers that need none, such as nnUNetTrainerLabeledOnly, work.")
    trainer = "Warps" if split.unlabeled else "LabeledOnly"
    print(f"Train fold 0, for instance:\n  nnUNetv2_plan_and_preprocess -d {args.target_id} -c 3d_fullres\n"
          f"  nnUNetv2_train {args.target_id} 3d_fullres 0 -tr nnUNetTrainer{trainer}")  # fmt: skip
