"""Which labeled image is warped onto which unlabeled ones: spread over the shapes that there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

SIDE = 8  # cells along each axis by which images are told apart


def description(data: np.ndarray) -> np.ndarray:
    """A short vector that is near for images that look alike.

    Args:
        data: ``[C, z, y, x]``.

    Returns:
        ``[C * cells]`` float32, of mean 0 and length 1 in each channel.
    """
    factors = [1.0, *(SIDE / n for n in data.shape[1:])]
    coarse = ndimage.zoom(np.asarray(data, np.float32), factors, order=1, mode="nearest").reshape(len(data), -1)
    coarse = coarse - coarse.mean(1, keepdims=True)
    return (coarse / np.maximum(np.linalg.norm(coarse, axis=1, keepdims=True), 1e-6)).ravel()


def spread_out(descriptions: np.ndarray) -> list[int]:
    """An order in which the first of any number are far apart (Gonzalez, 1985).

    Args:
        descriptions: ``[N, D]``.

    Returns:
        A permutation of N: first the one nearest to the mean, then always the one farthest from all before it.
    """
    to_mean = np.linalg.norm(descriptions - descriptions.mean(0), axis=1)
    order = [int(to_mean.argmin())]
    nearest = np.linalg.norm(descriptions - descriptions[order[0]], axis=1)
    nearest[order[0]] = -1.0
    while len(order) < len(descriptions):
        order.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(descriptions - descriptions[order[-1]], axis=1))
        nearest[order[-1]] = -1.0
    return order


def choose(
    labeled: Sequence[str],
    targets: Sequence[str],
    each: int,
    group_of: Mapping[str, str],
    taken: Sequence[tuple[str, str]] = (),
) -> list[tuple[str, str]]:
    """Pairs of images, so that all targets are used about equally often.

    Args:
        labeled: cases that are warped.
        targets: cases they may be warped onto, those that matter most first; none is warped onto itself.
        each: pairs of each labeled case, as far as there are targets.
        group_of: case -> patient; a case that it does not name counts as a separate patient.
        taken: pairs that there are, which count.

    Returns:
        New pairs (labeled, target), round by round.
    """
    uses = Counter(group_of.get(fixed, fixed) for _, fixed in taken)
    onto = {moving: {fixed for one, fixed in taken if one == moving} for moving in labeled}
    chosen = []
    for _ in range(each):
        for moving in labeled:
            if len(onto[moving]) >= each:
                continue
            left = [fixed for fixed in targets if fixed not in onto[moving] and fixed != moving]
            if not left:
                continue
            fixed = min(left, key=lambda case: uses[group_of.get(case, case)])  # the first of the least used
            uses[group_of.get(fixed, fixed)] += 1
            onto[moving].add(fixed)
            chosen.append((moving, fixed))
    return chosen
