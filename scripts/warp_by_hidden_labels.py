"""How far shapes alone could lead: warps registered by the hidden labels of the unlabeled images.

    python scripts/warp_by_hidden_labels.py -d 771 -t 776 -c 3d_fullres -p nnUNetPlans_2mm --pairs 30

For a diagnosis on a dataset whose unlabeled images do have labels, which a real use would not know. The new warps
replace those by ``nnUNetv2_ssl_warp`` in the dataset's folder, and ``nnUNetTrainerWarps`` trains with them; to get the
others back, delete the folder. ``-t`` is the dataset in which the same cases are labeled and prepared by the same
plans. Maps of the classes are registered, and not the images.
"""

from __future__ import annotations

import argparse
import os
from unittest.mock import patch

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.shapes import case
from nnunet_ssl.shapes.registration import Registration, Volume, array
from nnunet_ssl.shapes.warped import Wish, prepare_warps
from nnunet_ssl.unlabeled.find import read_dataset_json, read_plans, required_folder, resolve_dataset
from nnunet_ssl.unlabeled.prepare import labeled_folder, prepare_unlabeled

EDGE = 1.0  # voxels by which class maps are smoothed: demons follow their slopes


def class_maps(labeled: Volume) -> list[sitk.Image]:
    """Of each structure, smoothed and of the contrast of a z-scored image."""
    sigma = [EDGE * spacing for spacing in labeled.labels.GetSpacing()]
    maps = [sitk.Cast(labeled.labels == label, sitk.sitkFloat32) for label in labeled.structures]
    return [sitk.SmoothingRecursiveGaussian(one, sigma) * 4 for one in maps]


def main(argv: list[str] | None = None) -> None:
    """Make the warps, and print how well their labels fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="Dataset with few labels")
    parser.add_argument("-t", required=True, help="Dataset with all labels")
    parser.add_argument("-c", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("--pairs", type=int, default=30)
    args = parser.parse_args(argv)

    dataset, truth = resolve_dataset(args.d), resolve_dataset(args.t)
    folder = os.path.join(required_folder("nnUNet_preprocessed"), dataset)
    plans_manager = read_plans(os.path.join(folder, f"{args.p}.json"), "Plan it first.", args.c)
    dataset_json = read_dataset_json(folder)
    configuration = plans_manager.get_configuration(args.c)
    true_folder = labeled_folder(truth, configuration)
    labeled = sorted(
        name.removesuffix("_seg.b2nd")
        for name in os.listdir(labeled_folder(dataset, configuration))
        if name.endswith("_seg.b2nd")
    )
    unlabeled = prepare_unlabeled(dataset, plans_manager, args.c, dataset_json, labeled, 1)
    seen, scores = case.prepared_volume, []

    def with_truth(plans: dict, configuration: str, place: str, name: str, labels: bool) -> Volume:
        return seen(plans, configuration, place if labels else true_folder, name, True)

    registered = case.registered

    def by_truth(there: Volume, here: Volume, *_: object) -> tuple[Registration | None, sitk.Image | None, str | None]:
        found, labels, why = registered(*(one._replace(channels=class_maps(one)) for one in (there, here)))
        if labels is not None:
            one, other = array(labels), array(there.labels)
            pairs = [(one == label, other == label) for label in here.structures]
            scores.append(np.mean([2 * (a & b).sum() / max(1, a.sum() + b.sum()) for a, b in pairs]))
        return found, labels, why

    wish = Wish(dataset, plans_manager.plans, args.c, dataset_json, tuple(labeled), (), unlabeled, args.pairs)
    with patch.multiple(case, prepared_volume=with_truth, registered=by_truth):
        warps = prepare_warps(wish, 1)
    print(f"{len(warps.cases)} warps in {warps.folder}; mean Dice of {len(scores)} warped labels {np.mean(scores):.3f}")


if __name__ == "__main__":
    main()
