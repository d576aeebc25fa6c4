"""``nnUNetv2_ssl_pseudolabel``: offline self-training, with predictions of a model, an atlas, or both as labels."""

from __future__ import annotations

from nnunet_ssl.commands.arguments import Parser, count, dataset_id, fold, part, whole
from nnunet_ssl.errors import UserError

MIN_CONFIDENCE = 0.9
MIN_AGREEMENT = 0.7
TEACHERS = {"network": ("network",), "atlas": ("atlas",), "network,atlas": ("network", "atlas")}


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: arguments without the program's name; ``sys.argv`` when None.
    """
    parser = Parser(
        prog="nnUNetv2_ssl_pseudolabel",
        description="Predict the images of imagesUn and make a second raw dataset in which the best predictions are "
        "labels. A trained model predicts, or the labelled images, registered onto the others, or both; then the mean "
        "of their probabilities counts, and cases are chosen by how much the two agree. With --rounds also train on "
        "it, and repeat. Predicting, preprocessing and training are nnU-Net's own commands; a stopped run goes on "
        "where it was.",
    )
    parser.add_argument("-d", dest="dataset", required=True, help="Name or id of the dataset with imagesUn")
    parser.add_argument("-c", dest="configuration", required=True, help="Configuration, for instance 3d_fullres")
    parser.add_argument(
        "-f", dest="folds", type=fold, nargs="+", default=["0"],
        help="Fold of the trained model: a number, or all; of several the mean predicts. Default: 0",
    )  # fmt: skip
    parser.add_argument(
        "-tr", dest="trainer", default="nnUNetTrainer",
        help="Trainer of the model, and of the students. Default: nnUNetTrainer",
    )  # fmt: skip
    parser.add_argument("--student", metavar="TRAINER", help="Trainer of the students. Default: that of -tr")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="Plans identifier. Default: nnUNetPlans")
    parser.add_argument(
        "-o", dest="target_id", required=True, type=dataset_id,
        help="Id of the new dataset; further rounds take the next ids",
    )  # fmt: skip
    parser.add_argument(
        "--teachers", choices=TEACHERS, default="network",
        help="Who labels the images: the trained model, an atlas (the labelled images, registered onto each one), or "
        "both. Default: network",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=whole, default=0,
        help="Models to train, each on the predictions of the one before. Default: 0, which makes the dataset only",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--min-confidence", type=part, metavar="P",
        help=f"Keep the cases whose confidence reaches P. Default with one teacher: {MIN_CONFIDENCE}",
    )  # fmt: skip
    which.add_argument(
        "--min-agreement", type=part, metavar="P",
        help=f"Keep the cases on which two teachers agree: mean Dice of P or more. Default with two: {MIN_AGREEMENT}",
    )  # fmt: skip
    which.add_argument("--keep", type=part, metavar="FRACTION", help="Keep this fraction of the cases, the best ones")
    parser.add_argument("--warm", action="store_true", help="Train each student from its teacher's weights")
    parser.add_argument(
        "--finish", type=count, metavar="EPOCHS",
        help="Train the last student so many epochs more, on the labels alone; it becomes fold 1 of its dataset",
    )  # fmt: skip
    parser.add_argument(
        "-chk", dest="checkpoint", default="checkpoint_final.pth", help="Checkpoint. Default: checkpoint_final.pth"
    )
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="Default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--disable_tta", dest="mirroring", action="store_false", help="Predict without mirroring: faster, less accurate"
    )
    parser.add_argument(
        "--parts", type=count, default=1, metavar="N",
        help="Predict in N parts: the probabilities of one part at a time are on the disk. Default: 1",
    )  # fmt: skip
    parser.add_argument(
        "-np", dest="processes", type=count, help="Processes to predict and preprocess with. Default: nnU-Net's own"
    )
    parser.add_argument("--copy", action="store_true", help="Copy the images instead of linking to them")
    parser.add_argument("--dry-run", action="store_true", help="Print the commands that are to be run, and do nothing")
    args = parser.parse_args(argv)

    if args.target_id + args.rounds > 1000:
        raise UserError(
            f"-o {args.target_id} --rounds {args.rounds}: each round takes an id, and ids end at 999. Lower one."
        )
    args.folds, args.teachers = tuple(args.folds), TEACHERS[args.teachers]
    if args.min_agreement is not None and len(args.teachers) < 2:
        raise UserError("--min-agreement: one teacher has nobody to agree with. Use --teachers network,atlas.")
    if args.teachers == ("atlas",) and args.rounds > 1:
        raise UserError(
            f"--teachers atlas --rounds {args.rounds}: an atlas labels alike in all rounds. Use --rounds 1."
        )
    if args.teachers == ("atlas",) and args.warm:
        raise UserError("--warm: an atlas has no weights. Use --teachers network or network,atlas.")
    for option, given in (("--finish", args.finish), ("--student", args.student)):
        if given and not args.rounds:
            raise UserError(f"{option} is for the training of a student. Give --rounds too.")

    # heavy: only once the arguments are known to be good
    import torch

    from nnunet_ssl.self_training.rounds import self_train
    from nnunet_ssl.self_training.settings import Settings

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda: torch sees no GPU here; leave -device out to use the CPU.")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.by = "agreement" if len(args.teachers) > 1 and args.min_confidence is None else "confidence"
    args.at_least = args.min_agreement if args.by == "agreement" else args.min_confidence
    if args.at_least is None and args.keep is None:
        args.at_least = MIN_AGREEMENT if args.by == "agreement" else MIN_CONFIDENCE
    self_train(Settings(**{name: value for name, value in vars(args).items() if name in Settings._fields}))


if __name__ == "__main__":
    main()
