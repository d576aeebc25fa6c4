"""How well the filters of one network are linear combinations of another's: the dependence of CauSSL.

Source: Miao et al., "CauSSL: Causality-inspired Semi-supervised Learning for Medical Image Segmentation" (ICCV 2023),
and the authors' code. Theirs seeks the combinations by 60 steps of Adam; here they are found exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 1e-9  # of the filters' mean square, in float64, for filters that depend on each other


@torch.no_grad()
def best_combinations(filters: Tensor, others: Tensor) -> Tensor:
    """P, with which the rows of P W2 come nearest to those of W1, and so have the largest cosine to them.

    Args:
        filters: W1, ``[n, m]``.
        others: W2, ``[k, m]``, of the same dtype; k below m, or every filter is a combination.

    Returns:
        ``[n, k]``, dtype of ``filters``; nothing waits for its device.
    """
    w1, w2 = filters.double(), others.double()
    gram = w2 @ w2.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
    solution, _ = torch.linalg.solve_ex(gram, w2 @ w1.T)
    return solution.T.to(filters.dtype)


def dependence(filters: Sequence[Tensor], others: Sequence[Tensor], combinations: Sequence[Tensor]) -> Tensor:
    """D(1|2): the mean over layers of the mean over filters of ``cos^2(W1_n, (P W2)_n)``.

    Args:
        filters: W1 of each layer, ``[n, m]`` float32, with gradient.
        others: W2 of each layer, ``[k, m]`` float32, which get none.
        combinations: P of each layer, ``[n, k]`` float32, which get none.

    Returns:
        0-dim float32 in [0, 1].
    """
    layers = zip(filters, others, combinations, strict=True)
    of_layers = [F.cosine_similarity(w1, (p @ w2).detach()).square().mean() for w1, w2, p in layers]
    return torch.stack(of_layers).mean()
