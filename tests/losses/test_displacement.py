"""ABD's cells: their scores by loops, who takes whose place, and that nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from nnunet_ssl.losses.cubes import partition
from nnunet_ssl.losses.displacement import CellScores, cell_counts, cell_scores, divergence, put, reliable_match, take


@pytest.mark.parametrize(
    ("patch", "counts"),
    [
        ((256, 224), [4, 4]),
        ((128, 128, 128), [4, 2, 2]),
        ((20, 256, 256), [1, 4, 4]),
        ((64, 192, 160), [1, 4, 4]),
        ((16, 16, 16), [4, 2, 2]),
        ((15, 9), [1, 1]),
        ((15, 12), [1, 4]),
    ],
)
def test_about_sixteen_cells_that_divide_the_patch(patch, counts):
    assert cell_counts(patch) == counts
    assert all(n % c == 0 for n, c in zip(patch, counts, strict=True))


@pytest.mark.parametrize("regions", [False, True])
def test_scores_cell_by_cell(regions):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, requires_grad=True)
    scores = cell_scores(logits, (2, 3), regions)
    assert not scores.confidence.requires_grad
    for b in range(2):
        for n in range(6):
            i, j = np.unravel_index(n, (2, 3))
            cell = logits[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].detach()
            if regions:
                confidence = torch.maximum(cell.sigmoid(), 1 - cell.sigmoid()).mean()
            else:
                confidence = cell.softmax(0).amax(0).mean()
            torch.testing.assert_close(scores.confidence[b, n], confidence)
            torch.testing.assert_close(scores.logits[b, n], cell.mean((1, 2)))


def test_divergence_is_torchs():
    p, q = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(divergence(p, q), kl_divergence(Categorical(logits=p), Categorical(logits=q)))
    of_regions = kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)).sum(-1)
    torch.testing.assert_close(divergence(p, q, regions=True), of_regions)


def test_the_least_sure_cell_is_matched_with_the_most_alike_of_the_surest():
    confidence = torch.tensor([[0.9, 0.5, 0.6, 0.7, 0.8, 0.9, 0.6, 0.7]] * 2)
    confidence[1, 7] = 0.1
    unsure = CellScores(confidence, torch.zeros(2, 8, 2))
    unsure.logits[0, 1] = torch.tensor([2.0, 0.0])
    unsure.logits[1, 7] = torch.tensor([0.0, 2.0])
    other = CellScores(torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.4, 0.8, 0.5, 0.6]] * 2), torch.zeros(2, 8, 2))
    other.logits[:, 3] = torch.tensor([1.0, 0.0])  # two of eight are sure: 3 and 5
    other.logits[:, 5] = torch.tensor([0.0, 1.0])
    other.logits[:, 7] = torch.tensor([2.0, 0.0])  # alike, but not sure
    cell, match = reliable_match(unsure, other)
    assert cell.tolist() == [1, 7]
    assert match.tolist() == [3, 5]


def test_a_cell_takes_a_place_in_the_chosen_images_alone():
    torch.manual_seed(0)
    cells, other = (partition(torch.randn(3, 2, 4, 4), (2, 2)) for _ in range(2))
    index, source = torch.tensor([0, 3, 2]), torch.tensor([1, 1, 0])
    moved = put(cells, index, take(other, source), torch.tensor([True, False, True]))
    for b in range(3):
        for n in range(4):
            expected = other[b, source[b]] if n == index[b] and b != 1 else cells[b, n]
            assert torch.equal(moved[b, n], expected)


def test_alike_is_by_the_divergence_from_the_unsure_cell():
    """Of the other direction the order is another."""
    p, a, b = (torch.tensor(x).log() for x in ([0.5, 0.49, 0.01], [0.34, 0.33, 0.33], [0.95, 0.049, 0.001]))

    def divergence_of(x, y):
        return (x.exp() * (x - y)).sum()

    assert divergence_of(p, a) < divergence_of(p, b)
    assert divergence_of(a, p) > divergence_of(b, p)
    unsure = CellScores(torch.tensor([[0.1, *[0.9] * 7]]), p.expand(1, 8, 3))
    other = CellScores(
        torch.tensor([[0.0, 0.9, 0.0, 0.8, 0.0, 0.0, 0.0, 0.0]]), torch.stack([p, a, p, b, p, p, p, p])[None]
    )
    assert [found.item() for found in reliable_match(unsure, other)] == [0, 1]
