"""Images that labeled ones may be warped onto: none of somebody who tests."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from nnunetv2.paths import nnUNet_raw
from tqdm import tqdm

from nnunet_ssl.files import read_json, same_content
from nnunet_ssl.shapes.case import load
from nnunet_ssl.shapes.pairs import description, spread_out
from nnunet_ssl.unlabeled.find import PSEUDOLABELED, SPLIT, find_images
from nnunet_ssl.unlabeled.prepare import UnlabeledManifest
from nnunet_ssl.unlabeled.stamps import image_stamps
from nnunet_ssl.unlabeled.store import PreparedFolder

DESCRIBED = 200  # images among which those far apart are looked for


def test_images(dataset_name: str, ending: str) -> dict[str, list[str]]:
    """Test case -> its files, of the dataset's ``imagesTs``; none where that is not on this machine.

    Those of a dataset that this one was made from, by a split or by pseudo-labels, are among them.
    """
    raw = os.path.join(nnUNet_raw.get() or os.devnull, dataset_name)
    folder = os.path.join(raw, "imagesTs")
    found = find_images(folder, ending)[0] if os.path.isdir(folder) else {}
    for record in (os.path.join(raw, name) for name in (SPLIT, PSEUDOLABELED)):
        if os.path.isfile(record):
            said = read_json(record, "It says which dataset this one was made from.", keys={"source": str})
            found |= test_images(said["source"], ending)
    return found


def of_patients(cases: Collection[str], groupings: Collection[Mapping[str, str]], judging: Collection[str]) -> set[str]:
    """Those among ``cases`` that are test or validation cases by name, or by any grouping of a patient who has one."""
    found = set()
    for groups in groupings:
        judged = {groups.get(case, case) for case in judging}
        found |= {case for case in cases if groups.get(case, case) in judged}
    return found


def copies_of_tests(images: PreparedFolder, tests: Mapping[str, Sequence[str]]) -> set[str]:
    """Prepared unlabeled images that are test images under another name: their first file holds the same.

    Args:
        images: as ``prepare_unlabeled`` gives them; of no other images anything is known here.
        tests: test case -> its files; those are read whose size an unlabeled image has.

    Raises:
        UserError: one cannot be read.
    """
    first = {case: entry["raw"][0][1:] for case, entry in UnlabeledManifest.read(images.folder).cases.items()}
    sizes = {size for size, *_ in first.values()}
    alike = image_stamps({case: [files[0]] for case, files in tests.items() if os.path.getsize(files[0]) in sizes})
    same = [test[0][1:] for test in alike.values()]
    return {case for case, raw in first.items() if any(same_content(raw, test) for test in same)}


def far_apart_first(images: PreparedFolder, cases: Collection[str]) -> list[str]:
    """An order of the images that may be warped onto.

    Args:
        images: prepared ones.
        cases: those among them that may.
    """
    if not cases:
        return []
    cases = [str(case) for case in np.random.default_rng(0).permutation(sorted(cases))]
    looks = [
        description(load(images.places[case], case)[0])
        for case in tqdm(cases[:DESCRIBED], "Looking at images to warp onto", delay=3, leave=False)
    ]
    return [cases[i] for i in spread_out(np.stack(looks))] + cases[DESCRIBED:]
