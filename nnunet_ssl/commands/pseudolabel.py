"""``nnUNetv2_ssl_pseudolabel``: offline self-training, with predictions of a model, an atlas, or both as labels."""

from __future__ import annotations

from nnunet_ssl.commands.arguments import NEW_DATASET, Parser, add_shared, count, find_device, part, whole
from nnunet_ssl.errors import UserError

MIN_CONFIDENCE = 0.9
MIN_AGREEMENT = 0.7
TEACHERS = {"network": ("network",), "atlas": ("atlas",), "network,atlas": ("network", "atlas")}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_pseudolabel",
        description="Predict the images of imagesUn and make a second raw dataset in which the best predictions are "
        "labels. The teacher is a trained model, the labeled images registered onto the others, or both; two teachers "
        "average their probabilities, and cases are chosen by their agreement. With --rounds, also train on the new "
        "dataset, and repeat. Prediction, preprocessing and training use nnU-Net's own commands; a stopped run resumes "
        "where it was.",
    )
    add_shared(parser, "-d", help="Name or id of the dataset with imagesUn")
    add_shared(parser, "-c")
    add_shared(
        parser, "-f", dest="folds", metavar="FOLD", nargs="+", default=["0"],
        help="Folds: numbers, or all; several predict with their mean. Default: 0",
    )  # fmt: skip
    add_shared(parser, "-tr", help="Trainer of the model, and of the students")
    add_shared(parser, "-p", "-chk")
    add_shared(parser, "-o", **NEW_DATASET | {"help": "Id of the new dataset; later rounds use the next ids"})
    parser.add_argument(
        "--teachers", choices=TEACHERS, default="network", metavar="WHO",
        help="Who labels the images: the trained model (network), the labeled images, registered onto each one "
        "(atlas), or both (network,atlas). Default: network",
    )  # fmt: skip
    parser.add_argument("--student", metavar="TRAINER", help="Trainer of the students. Default: the one of -tr")
    parser.add_argument(
        "--rounds", type=whole, default=0, metavar="N",
        help="Models to train, each on the predictions of the previous one. Default: 0, which only makes the dataset",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--min-confidence", type=part, metavar="P",
        help=f"Keep the cases whose confidence is at least P. Default with one teacher: {MIN_CONFIDENCE}",
    )  # fmt: skip
    which.add_argument(
        "--min-agreement", type=part, metavar="P",
        help=f"Keep the cases on which two teachers agree with a mean Dice of at least P. Default: {MIN_AGREEMENT}",
    )  # fmt: skip
    which.add_argument("--keep", type=part, metavar="FRACTION", help="Keep this fraction of the cases, the best ones")
    parser.add_argument("--warm", action="store_true", help="Train each student from its teacher's weights")
    parser.add_argument(
        "--finish", type=count, metavar="EPOCHS",
        help="In the end train for EPOCHS on labels alone, from the last student's weights (but for its output layers, "
        "as -pretrained_weights does it); the result is fold 1 of its dataset",
    )  # fmt: skip
    parser.add_argument(
        "--parts", type=count, default=1, metavar="N",
        help="Predict in N parts, so that only one part's probabilities are on the disk at a time. Default: 1",
    )  # fmt: skip
    add_shared(parser, "--copy", "-device", "--disable_tta", "-np", "--dry-run")
    args = parser.parse_args(argv)

    if args.target_id + args.rounds > 1000:
        raise UserError(
            f"-o {args.target_id} --rounds {args.rounds}: each round uses one id, and ids end at 999. Lower one."
        )
    args.folds, args.teachers = tuple(args.folds), TEACHERS[args.teachers]
    if args.min_agreement is not None and len(args.teachers) < 2:
        raise UserError("--min-agreement: one teacher has nobody to agree with. Use --teachers network,atlas.")
    if args.teachers == ("atlas",) and args.rounds > 1:
        raise UserError(
            f"--teachers atlas --rounds {args.rounds}: an atlas gives the same labels in every round. Use --rounds 1."
        )
    if args.teachers == ("atlas",) and args.warm:
        raise UserError("--warm: an atlas has no weights. Use --teachers network or network,atlas.")
    for option, given in (("--finish", args.finish), ("--student", args.student)):
        if given and not args.rounds:
            raise UserError(f"{option} is for training a student. Give --rounds too.")

    # heavy: only once the arguments are known to be good
    from nnunet_ssl.self_training.rounds import self_train
    from nnunet_ssl.self_training.settings import Settings

    args.device = find_device(args.device)
    args.by = "agreement" if len(args.teachers) > 1 and args.min_confidence is None else "confidence"
    args.at_least = args.min_agreement if args.by == "agreement" else args.min_confidence
    if args.at_least is None and args.keep is None:
        args.at_least = MIN_AGREEMENT if args.by == "agreement" else MIN_CONFIDENCE
    self_train(Settings(**{name: value for name, value in vars(args).items() if name in Settings._fields}))
