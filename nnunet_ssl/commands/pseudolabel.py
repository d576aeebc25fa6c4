"""``nnUNetv2_ssl_pseudolabel``: offline self-training, with a trained model's confident predictions as labels."""

from __future__ import annotations

from nnunet_ssl.commands.arguments import Parser, count, dataset_id, fold, part, whole
from nnunet_ssl.errors import UserError

MIN_CONFIDENCE = 0.9


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: arguments without the program's name; ``sys.argv`` when None.
    """
    parser = Parser(
        prog="nnUNetv2_ssl_pseudolabel",
        description="Predict the images of imagesUn with a trained model and make a second raw dataset in which the "
        "confident predictions are labels. With --rounds also train on it, and repeat. Predicting, preprocessing and "
        "training are nnU-Net's own commands; a stopped run goes on where it was.",
    )
    parser.add_argument("-d", required=True, help="Name or id of the dataset with imagesUn")
    parser.add_argument("-c", required=True, help="Configuration, for instance 3d_fullres")
    parser.add_argument("-f", type=fold, default="0", help="Fold of the trained model: a number, or all. Default: 0")
    parser.add_argument("-tr", default="nnUNetTrainer", help="Trainer, of every round. Default: nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans identifier. Default: nnUNetPlans")
    parser.add_argument(
        "-o", required=True, type=dataset_id, help="Id of the new dataset; further rounds take the next ids"
    )
    parser.add_argument(
        "--rounds", type=whole, default=0,
        help="Models to train, each on the predictions of the one before. Default: 0, which makes the dataset only",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--min-confidence", type=part, metavar="P",
        help=f"Keep the cases whose confidence reaches P. Default: {MIN_CONFIDENCE}",
    )  # fmt: skip
    which.add_argument("--keep", type=part, metavar="FRACTION", help="Keep this fraction of the cases, the best ones")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="Checkpoint. Default: checkpoint_final.pth")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="Default: cuda where there is a GPU, else cpu")
    parser.add_argument("--disable_tta", action="store_true", help="Predict without mirroring: faster, less accurate")
    parser.add_argument(
        "--parts", type=count, default=1, metavar="N",
        help="Predict in N parts: the probabilities of one part at a time are on the disk. Default: 1",
    )  # fmt: skip
    parser.add_argument("-np", type=count, help="Processes to predict and preprocess with. Default: nnU-Net's own")
    parser.add_argument("--copy", action="store_true", help="Copy the images instead of linking to them")
    parser.add_argument("--dry-run", action="store_true", help="Print the commands that are to be run, and do nothing")
    args = parser.parse_args(argv)

    if args.o + args.rounds > 1000:
        raise UserError(f"-o {args.o} --rounds {args.rounds}: each round takes an id, and ids end at 999. Lower one.")

    # heavy: only once the arguments are known to be good
    import torch

    from nnunet_ssl.self_training import SelfTraining

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda: torch sees no GPU here; leave -device out to use the CPU.")
    min_confidence = MIN_CONFIDENCE if args.min_confidence is None and args.keep is None else args.min_confidence
    SelfTraining(
        dataset=args.d,
        configuration=args.c,
        fold=args.f,
        trainer=args.tr,
        plans=args.p,
        checkpoint=args.chk,
        target_id=args.o,
        rounds=args.rounds,
        min_confidence=min_confidence,
        keep=args.keep,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        mirroring=not args.disable_tta,
        parts=args.parts,
        processes=args.np,
        copy=args.copy,
        dry_run=args.dry_run,
    ).run()


if __name__ == "__main__":
    main()
