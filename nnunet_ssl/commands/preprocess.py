"""``nnUNetv2_ssl_preprocess``: prepare the images without labels ahead of training."""

from __future__ import annotations

import os

from nnunet_ssl.commands.arguments import Parser, add_shared
from nnunet_ssl.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(
        prog="nnUNetv2_ssl_preprocess",
        description="Prepare the images of imagesUn before training. Training would do this itself; run it ahead if, "
        "for instance, the machine with the GPU has few CPU cores. Only new and changed images are prepared.",
    )
    add_shared(parser, "-d", dest="datasets", nargs="+", metavar="DATASET", help="Names or ids of the datasets")
    add_shared(
        parser, "-c", dest="configurations", nargs="+", metavar="CONFIGURATION", required=False,
        default=["2d", "3d_fullres", "3d_lowres"],
        help="Configurations; any that are not in the plans are skipped. Default: 2d 3d_fullres 3d_lowres",
    )  # fmt: skip
    add_shared(parser, "-p", "-np")
    args = parser.parse_args(argv)

    # heavy: only once the arguments are known to be good
    from nnunetv2.configuration import default_num_processes

    from nnunet_ssl.unlabeled.find import find_labeled, read_dataset_json, read_plans, required_folder, resolve_dataset
    from nnunet_ssl.unlabeled.prepare import prepare_unlabeled

    for dataset in map(resolve_dataset, args.datasets):
        raw = os.path.join(required_folder("nnUNet_raw"), dataset)
        preprocessed = os.path.join(required_folder("nnUNet_preprocessed"), dataset)
        plans_file = os.path.join(preprocessed, f"{args.plans}.json")
        if not os.path.isfile(plans_file):
            raise UserError(
                f"{plans_file} does not exist. Run nnUNetv2_plan_and_preprocess first, or name the plans with -p."
            )
        plans_manager = read_plans(plans_file, "Run nnUNetv2_plan_experiment again.")
        dataset_json = read_dataset_json(preprocessed)
        configurations = [c for c in args.configurations if c in plans_manager.available_configurations]
        if not configurations:
            raise UserError(
                f"{plans_file} has none of the configurations {' '.join(args.configurations)}, but "
                f"{' '.join(plans_manager.available_configurations)}. Name one of these with -c."
            )
        labeled = find_labeled(raw, dataset_json)
        for configuration in configurations:
            prepared = prepare_unlabeled(
                dataset, plans_manager, configuration, dataset_json, labeled, args.processes or default_num_processes
            )
            print(f"{configuration}: {len(prepared.cases)} unlabeled images are ready in {prepared.folder}")
