"""What both figures of SHTA's tokens read, in one pass over the cases: each is prepared once, for all runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.figures.options import NotApplicable
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.shta.branch import (
    Patches,
    Tokens,
    baseline_and_shta,
    cut_patches,
    has_branch,
    load_branch,
    load_model,
    preparation,
    read_tokens,
)
from nnunet_ssl.figures.test_set import Case
from nnunet_ssl.files import read_json
from nnunet_ssl.randomness import derived_seed
from nnunet_ssl.trainers.resuming import training_state_file

TOKENS_PER_CLASS = 400  # at most
RULE = (
    "tokens that are eligible by Eq. 7 (share of foreground and of the most frequent class; the run's own thresholds). "
    "They come from patches side by side, without overlap, padded with zeros beyond the image, so near a patch border "
    "a network sees less than it does when it predicts."
)


@dataclass(frozen=True)
class Survey:
    """What the runs say of the tokens of all cases."""

    compared: tuple[TrainedRun, ...]  # SHTA's host, where it is among the runs and sees the same patches, and SHTA
    left_out: TrainedRun | None  # the host that does not
    sample: ClassSample  # of the chosen classes; of the only one and of the background, where one is chosen
    proxies: np.ndarray  # [K, C_z], of unit length, of the last of ``compared``
    stride: tuple[int, ...]  # voxels of a token, of the same
    # each checkpoint with SHTA, earliest ones before their run -> eligible tokens [K, K]: rows are classes by the
    # truth, those not chosen are empty; columns are the classes whose proxies are nearest
    counts: dict[TrainedRun, np.ndarray]


@functools.lru_cache(maxsize=1)  # the two figures are drawn one after the other
def survey(
    runs: tuple[TrainedRun, ...], cases: tuple[Case, ...], classes: tuple[int, ...], device: str, seed: int
) -> Survey:
    """Read the tokens of all cases as the runs with SHTA see them, and the host of one.

    Raises:
        NotApplicable: no run was trained with SHTA.
        UserError: a model or a branch cannot be read.
    """
    host, shta = baseline_and_shta(runs)
    if shta is None:
        raise NotApplicable("none of the trainers has SHTA's tokens and proxies. Add one whose name has SHTA_.")
    asked = [each for run in runs if has_branch(run) for each in [*earliest_kept(run), run]]
    models = {run: load_model(run, device) for run in ([] if host is None else [host]) + asked}
    branches = {run: load_branch(run, models[run]) for run in asked}
    ways = {run: preparation(models[run], branches.get(run, branches[shta])) for run in models}
    left_out = None
    if host is not None and ways[host] != ways[shta]:
        host, left_out = None, host
    compared = tuple(run for run in (host, shta) if run is not None)

    sample = ClassSample(TOKENS_PER_CLASS, seed)
    num_classes = branches[shta].num_classes
    counts = {run: np.zeros((num_classes, num_classes), int) for run in asked}
    for case in tqdm(cases, "Reading tokens"):
        cut: dict[str, Patches] = {}
        seen = {}
        for run in dict.fromkeys([*compared, *asked]):
            branch = branches.get(run, branches[shta])
            if ways[run] not in cut:
                cut[ways[run]] = cut_patches(models[run], branch, case, background=len(classes) == 1)
            if not len(cut[ways[run]].images):
                continue
            tokens = read_tokens(models[run], branch, cut[ways[run]], embed=run in branches)
            if run in branches:
                np.add.at(counts[run], (tokens.classes.numpy(), tokens.assignment.argmax(1).numpy()), 1)
            if run in compared:
                seen[run.name] = tokens
        if seen:
            sample.add(seen)
    for count in counts.values():
        count[[label for label in range(num_classes) if label not in classes]] = 0
    proxies = F.normalize(branches[shta].loss.proxies.detach().cpu(), dim=1).numpy()
    return Survey(compared, left_out, sample, proxies, branches[shta].stride, counts)


def earliest_kept(run: TrainedRun) -> list[TrainedRun]:
    """The same run after the first of the epochs that its setting ``keep_epochs`` kept, or nothing."""
    kept = [
        (int(match[1]), file.name)
        for file in run.fold_folder.iterdir()
        if (match := re.fullmatch(r"checkpoint_epoch(\d+)\.pth", file.name))
        and os.path.isfile(training_state_file(str(file)))
    ]
    epoch, checkpoint = min(kept, default=(0, run.checkpoint))
    if checkpoint == run.checkpoint:
        return []
    return [dataclasses.replace(run, name=f"{run.name}, epoch {epoch}{_of_all(run, epoch)}", checkpoint=checkpoint)]


def _of_all(run: TrainedRun, epoch: int) -> str:
    """The number of epochs and how far ``epoch`` is, by nnU-Net's own note of the training, if it is there."""
    try:
        total = int(read_json(run.fold_folder / "debug.json", "")["num_epochs"])
        return f" of {total} ({epoch / total:.0%})"
    except (UserError, LookupError, TypeError, ValueError, ZeroDivisionError):
        return ""


class ClassSample:
    """At most ``size`` tokens of each class, each token of all cases with the same chance, in one pass.

    Every token draws a number by the seed and its case; the lowest numbers of a class stay. Which tokens these are
    depends on the labels alone, so all runs show the same ones.

    Attributes:
        classes: ``[N]``.
        features: name of a run -> ``[N, C]``, the mean decoder feature.
        embedding: ``[N, C_z]``, of unit length, since Eq. 3 compares directions.
        total: label -> how many tokens there were to draw from.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.total: Counter[int] = Counter()
        self.classes, self.draws, self.embedding, self.features = np.empty(0, int), np.empty(0), None, {}

    def add(self, seen: Mapping[str, Tokens]) -> None:
        """Take the tokens of one case, as each run sees them; the last one has the embedding."""
        last = list(seen.values())[-1]
        classes = last.classes.numpy()
        self.total.update(classes.tolist())
        rng = np.random.default_rng(derived_seed(self.seed, "tokens", last.case))
        self.classes = np.concatenate([self.classes, classes])
        self.draws = np.concatenate([self.draws, rng.random(len(classes))])
        keep = lowest_of_each_class(self.classes, self.draws, self.size)
        self.classes, self.draws = self.classes[keep], self.draws[keep]
        for name, tokens in seen.items():
            self.features[name] = _joined(self.features.get(name), tokens.feature.numpy())[keep]
        self.embedding = _joined(self.embedding, F.normalize(last.embedding, dim=1).numpy())[keep]


def _joined(before: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    return new if before is None else np.concatenate([before, new])


def lowest_of_each_class(classes: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """Indices of the ``size`` lowest ``draws`` ``[N]``, float, of each class in ``classes`` ``[N]``, in their order."""
    order = np.lexsort((draws, classes))
    rank = np.arange(len(order)) - np.searchsorted(classes[order], classes[order])
    return np.sort(order[rank < size])
