"""The votes of a fold's labeled cases on every unlabeled image, each made once, and again only when it has to be.

They lie in ``<nnUNet_preprocessed>/<dataset>/<data_identifier>_votes/fold_<fold>``, as ``unlabeled/store.py`` keeps
it: of each image ``<case>.npz`` and ``<case>.pkl``, as ``nnUNetv2_predict --save_probabilities`` writes them, on the
grid of the raw image, but always of labels, also where the dataset has regions. Those who vote are the fold's training
cases alone: no label of a validation case has a part in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import Stamp
from nnunet_ssl.shapes.case import load, prepared_volume, registered, spacing_of, stamps_of
from nnunet_ssl.shapes.pairs import description
from nnunet_ssl.shapes.quality import refuse_few
from nnunet_ssl.shapes.registration import VERSION, one_thread, volume
from nnunet_ssl.shapes.vote import Atlas, atlas, vote
from nnunet_ssl.unlabeled.case import Preparation
from nnunet_ssl.unlabeled.store import Manifest, Outcome, PreparedFolder, cannot_write, disk_failure, memory_failure

ATLASES = 10  # that vote on an image: those most like it


@dataclass(frozen=True)
class Electorate(Preparation):
    """Who votes.

    Attributes:
        fold: for the folder's name.
        labeled: the cases that vote.
    """

    fold: str
    labeled: tuple[str, ...]

    @cached_property
    def about(self) -> dict:
        """What determines a vote, in addition to the images."""
        labels = {key: self.dataset_json.get(key) for key in ("labels", "regions_class_order")}
        return {"preprocessing": self.preprocessing, **json.loads(json.dumps(labels))}

    @property
    def folder(self) -> str:
        """Of the votes."""
        return os.path.join(f"{self.labeled_folder}_votes", f"fold_{self.fold}")

    @property
    def identity(self) -> str:
        """What tells other voters from these.

        Raises:
            UserError: a labeled case is not prepared.
        """
        stamps = _stamps(self, VoteManifest.read(self.folder).about["labeled"])
        return f"{len(self.labeled)} cases ({_digest(self.about, stamps, '')[:12]})"


class VoteManifest(Manifest):
    """The votes; an entry has "made_from", a digest of all images, and "atlases".

    "atlases" says of each labeled case that was registered how alike the two were ("after"), and "why" it does not
    vote if it does not. Of all votes it says "labeled", stamps of the files of the labeled cases.
    """

    FORMAT: ClassVar[int] = 2
    ABOUT: ClassVar[dict[str, type]] = {"labeled": dict}

    def check(self) -> None:
        """All entries say what they are made from, and by whom."""
        for entry in self.cases.values():
            _ = os.fspath(entry["made_from"]), [one.get("why") for one in entry["atlases"].values()]

    def content_of(self, case: str) -> str:
        """Of all images."""
        return self.cases[case]["made_from"]


def prepare_votes(electorate: Electorate, images: PreparedFolder, num_processes: int) -> VoteManifest:
    """Make or complete the votes on all unlabeled images; they stay as they are until this process ends.

    Args:
        electorate: who votes.
        images: the prepared images to vote on.
        num_processes: images voted on at a time; 1 votes in this process.

    Returns:
        Their manifest.

    Raises:
        UserError: the images do not register, or the disk stands in the way. What was finished is kept.
    """
    folder = electorate.folder
    while True:
        manifest = VoteManifest.read(folder)
        stamps = _stamps(electorate, manifest.about["labeled"])
        made_from = {case: _digest(electorate.about, stamps, images.contents[case]) for case in images.cases}

        def missing(manifest: VoteManifest, made_from: Mapping[str, str] = made_from) -> list[str]:
            cases = manifest.cases
            return [
                case
                for case, digest in made_from.items()
                if case not in cases or cases[case]["made_from"] != digest or not manifest.files_are_there(case)
            ]

        if missing(manifest):
            try:
                with manifest.locked(wait=True):
                    manifest = VoteManifest.read(folder)  # another process may have done it meanwhile
                    if todo := missing(manifest):
                        manifest.remove_unread()
                        current = {c: e for c, e in manifest.cases.items() if c in made_from and c not in todo}
                        manifest = VoteManifest(folder, {"labeled": stamps}, current)
                        _complete(electorate, images, manifest, {case: made_from[case] for case in todo}, num_processes)
                    manifest.remove_unread("votes")
            except OSError as error:
                raise UserError(cannot_write(folder, error.strerror or str(error))) from error
        if manifest.keep():
            atlases = [one for entry in manifest.cases.values() for one in entry["atlases"].values()]
            bad = Counter(one["why"] for one in atlases if "why" in one)
            remedy = "so an atlas teaches nothing here. Use --teachers network."
            refuse_few(folder, len(atlases) - bad.total(), bad, remedy)
            return manifest


def _complete(
    electorate: Electorate, images: PreparedFolder, manifest: VoteManifest, made_from: dict[str, str], processes: int
) -> None:
    cases = list(made_from)
    atlases = _most_alike(electorate, {case: images.places[case] for case in cases})
    manifest.write()  # first: a file may be put back as it was before we are done
    print(
        f"nnunet_ssl: {sum(map(len, atlases.values()))} registrations of {len(electorate.labeled)} labeled images "
        f"onto {len(cases)} unlabeled ones; the votes are kept in {manifest.folder}",
        flush=True,
    )
    problems = manifest.make(
        vote_case,
        {case: (electorate, atlases[case], case, images.places[case], made_from[case]) for case in cases},
        processes,
        "Voting on unlabeled images",
        "Vote on fewer at a time (-np 1); finished votes are kept.",
    )
    if problems:
        raise UserError(f"{manifest.folder}: {problems[0]}; {len(problems)} image(s) in all. Train without an atlas.")


@one_thread()
def vote_case(
    task: Preparation, atlases: Sequence[str], case: str, case_folder: str, made_from: str, place: str
) -> Outcome:
    """Register the atlases onto one image, and save what they say of it into its own folder."""
    entry: dict[str, Any] = {"made_from": made_from, "atlases": {}}
    try:
        plans_manager = PlansManager(task.plans)
        labels = plans_manager.get_label_manager(task.dataset_json).all_labels
        image, _, properties = load(case_folder, case)
        there = volume(image, spacing_of(task, properties))

        def good() -> Iterator[Atlas]:
            for name in atlases:
                here = prepared_volume(task, task.labeled_folder, name, True)
                found, _, why = registered(there, here)
                entry["atlases"][name] = {} if found is None else {"after": round(found.after, 4)}
                if why:
                    entry["atlases"][name]["why"] = why
                elif found is not None:
                    yield atlas(here, there.channels[0], found.transform, labels)

        votes = vote(image, good(), len(labels))
        os.makedirs(place)
        file = os.path.join(place, case)
        probabilities = as_predicted(votes, properties, plans_manager, task.configuration, task.dataset_json)
        np.savez_compressed(f"{file}.npz", probabilities=probabilities.astype(np.float16))
        save_pickle(properties, f"{file}.pkl")
    except Exception as error:
        if why := memory_failure(error, f"{case} and the labeled cases do", "Vote on fewer at a time (-np 1)"):
            return Outcome(case, entry, why, fatal=True)
        if lost := disk_failure(error, place):
            return Outcome(case, entry, lost, fatal=True)
        return Outcome(case, entry, f"{case} cannot be voted on ({type(error).__name__}: {error})")
    return Outcome(case, entry)


def as_predicted(
    votes: np.ndarray, properties: dict, plans_manager: PlansManager, configuration: str, dataset_json: dict
) -> np.ndarray:
    """Votes as ``nnUNetv2_predict --save_probabilities`` gives a network's probabilities, by nnU-Net's own function.

    Args:
        votes: ``[K, z, y, x]`` float32, of the labels, on the grid of the prepared image.
        properties: of the prepared image.
        plans_manager, configuration, dataset_json: that it was prepared with.

    Returns:
        ``[K, *raw image]`` float32.
    """
    # they are probabilities already, and interpolated as such; of labels, as only then their sum tells who voted
    labels = plans_manager.get_label_manager(dataset_json).all_labels
    named = {"background": 0, **{str(label): label for label in labels[1:]}}
    label_manager = LabelManager(named, None, inference_nonlin=lambda votes: votes)
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        votes,
        plans_manager,
        plans_manager.get_configuration(configuration),
        label_manager,
        properties,
        return_probabilities=True,
        num_threads_torch=1,
    )[1]


def _most_alike(electorate: Electorate, images: Mapping[str, str]) -> dict[str, list[str]]:
    """Image -> the labeled cases that are to vote on it; ``images`` gives the folder of each."""
    labeled = list(electorate.labeled)
    if len(labeled) <= ATLASES:
        return dict.fromkeys(images, labeled)
    places = {**dict.fromkeys(labeled, electorate.labeled_folder), **images}
    bar = tqdm(places.items(), "Looking at images", delay=3, leave=False)
    looks = {case: description(load(folder, case)[0]) for case, folder in bar}

    def nearest(case: str) -> list[str]:
        distance = np.linalg.norm([looks[name] - looks[case] for name in labeled], axis=1)
        return [labeled[i] for i in np.argsort(distance, kind="stable")[:ATLASES]]

    return {case: nearest(case) for case in images}


def _stamps(electorate: Electorate, known: Mapping[str, list]) -> dict[str, list[list[str | Stamp]]]:
    """Of the files of each labeled case that votes.

    Raises:
        UserError: one is not there, or cannot be read.
    """
    return {case: stamps_of(electorate, case, known.get(case, ())) for case in electorate.labeled}


def _digest(about: dict, stamps: Mapping[str, list], content: str) -> str:
    """Of all that a vote is made from."""
    labeled = {case: [digest for *_, digest in files] for case, files in stamps.items()}
    return hashlib.sha256(
        json.dumps([VERSION, VoteManifest.FORMAT, about, labeled, content], sort_keys=True).encode()
    ).hexdigest()
