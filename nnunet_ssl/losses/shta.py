"""SHTA: Semantic Hard Token correction and center Alignment.

Source: Zhang, Zhong, Zhang, Liu, "SHTA: Semantic Hard Token Correction and Center Alignment for Semi-Supervised
Medical Image Segmentation". Equation numbers are the paper's. Its code is not public; where the paper leaves a choice
open, the choice is a named setting of :class:`SHTALoss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.losses.masked import masked_mean


def token_class_distribution(
    labels: Tensor,
    stride: Sequence[int],
    num_classes: int,
    ignore_label: int | None = None,
    min_valid_fraction: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """TokDist of Eq. 1: the share of each class among the voxels of each token, exactly.

    The voxels of a token are counted per class; no one-hot map of the patch is made.

    Args:
        labels: ``[B, *spatial]`` of any integer type, 2D or 3D, values in ``0 .. num_classes - 1`` or ``ignore_label``.
            Other negative values (nnU-Net's padding) count as background, as they do in nnU-Net's own loss.
        stride: voxels per token along each axis; each must divide its axis.
        num_classes: K, with background.
        ignore_label: voxels with this value are not counted, and the rest of the token is renormalised.
        min_valid_fraction: a token with a smaller share of counted voxels is not valid.

    Returns:
        ``Y`` ``[B, L, K]`` float32, tokens in C order of the grid; rows of valid tokens sum to 1, the others are 0.
        ``valid`` ``[B, L]`` bool.

    Raises:
        ValueError: if ``stride`` does not fit the shape of ``labels``.
        RuntimeError: if a label is ``num_classes`` or more and not the ignore label (from torch's scatter; on a GPU
            as a device assertion).
    """
    spatial = labels.shape[1:]
    if len(stride) != len(spatial) or any(n % s for n, s in zip(spatial, stride, strict=True)):
        raise ValueError(f"token stride {tuple(stride)} does not divide the patch {tuple(spatial)}")

    batch, dim = labels.shape[0], len(spatial)
    ignored = torch.zeros_like(labels, dtype=torch.bool) if ignore_label is None else labels == ignore_label
    bins = labels.long().clamp(min=0)
    bins = (bins + (bins >= num_classes)).masked_fill(ignored, num_classes)  # bin K is for what is ignored alone

    # [B, g1, s1, g2, s2, ...] -> [B, g1, g2, ..., s1, s2, ...] -> [B, L, voxels of a token]
    grid = [size for n, s in zip(spatial, stride, strict=True) for size in (n // s, s)]
    order = [0, *range(1, 2 * dim, 2), *range(2, 2 * dim + 1, 2)]
    voxels_per_token = torch.Size(stride).numel()
    bins = bins.reshape(batch, *grid).permute(order).reshape(batch, -1, voxels_per_token)
    counts = torch.zeros(*bins.shape[:2], num_classes + 1, device=labels.device)
    counts.scatter_add_(2, bins, torch.ones((), device=labels.device).expand(bins.shape))
    counts = counts[..., :num_classes]
    total = counts.sum(2, keepdim=True)
    valid = (total[..., 0] >= min_valid_fraction * voxels_per_token) & (total[..., 0] > 0)
    return torch.where(valid[..., None], counts / total.clamp(min=1), 0.0), valid


class SHTATerms(NamedTuple):
    """What SHTA says of one batch. Losses carry gradients; the readouts are detached. All are 0-dim float32."""

    assign: Tensor  # L_assign, Eq. 5
    anchor: Tensor  # L_anchor, Eq. 5
    hard: Tensor  # L_hard, Eq. 8
    center: Tensor  # L_center, Eq. 10
    total: Tensor  # L_SHTA, Eq. 11
    num_candidates: Tensor  # |Omega_cand|
    num_hard: Tensor  # |Omega_hard|
    hard_ratio: Tensor  # |Omega_hard| / |Omega_l|, the supply of Table IV
    candidate_ratio: Tensor  # |Omega_cand| / |Omega_l|
    token_accuracy: Tensor  # share of tokens whose most likely proxy is their most frequent class
    proxy_cosine: Tensor  # mean cos(c_k, mu_k) over the classes present
    center_gap: Tensor  # mean Euclidean distance of unit centers to unit references over K_h (Table IV, our reading)


class SHTALoss(nn.Module):
    """The three SHTA losses on token embeddings, with the class proxies that they learn (Eq. 3 to 11).

    A token whose row of ``y_tok`` is all zero is not in Omega_l (it is unlabelled or mostly ignored) and takes no part.
    Every set may be empty: a mean over an empty set is 0 with zero gradient, so that each parameter gets a gradient on
    every rank at every step. No value is read back to the CPU.

    Args:
        num_classes: K, with background as class 0.
        embedding_dim: C_z.
        temperature: tau_sa of Eq. 3. Table IV (correction loss 0.054 at K = 14) excludes values above 0.2 to 0.37.
        conf_threshold: T_conf of Eq. 7. 0 does not bind: Table IV's equal supply in two settings whose q differ says
            that the paper's does not either.
        fg_threshold: T_fg of Eq. 7, on the share of foreground.
        purity_threshold: T_pur of Eq. 7, on the share of the most frequent foreground class.
        hard_ratio: r of Eq. 7, a share of the candidates; ``ceil(r * candidates)`` are taken, so at least one.
        matched_hard: T_conf excludes nothing, so how many tokens are selected follows from the labels alone, and losses
            of different settings are means over equally many tokens ("matched-hard", Table IV).
        assign_weight: alpha_as of Eq. 11.
        anchor_weight: alpha_a.
        hard_weight: alpha_h.
        center_weight: alpha_c.
        selection: ``"global"`` ranks all candidates of the batch together (Eq. 7 names one set), ``"per_class"`` takes
            the share r of each class, which keeps large organs from taking every place.
        detach_reference_in_anchor: c_k gets no gradient in L_anchor, which "calibrates" the proxies.
        detach_reference_in_center: c_k gets no gradient in L_center, where it is the reference.
        normalize_embeddings: use unit z in Eq. 4 and 9; the equations are written with raw z.
        min_class_mass: a class enters K' when its mass (in tokens) is above this; 0 as in Eq. 4.
        sync_references: in DDP, sum Eq. 4 over the ranks; needs both references detached.
        eps: epsilon of Eq. 4 (Eq. 5's is replaced by a log-softmax, which needs none).

    Attributes:
        proxies: ``[K, C_z]`` parameter mu, unit length at the start, normalised on use.

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        temperature: float = 0.1,
        conf_threshold: float = 0.0,
        fg_threshold: float = 0.5,
        purity_threshold: float = 0.5,
        hard_ratio: float = 0.5,
        matched_hard: bool = False,
        assign_weight: float = 1.0,
        anchor_weight: float = 1.0,
        hard_weight: float = 1.0,
        center_weight: float = 1.0,
        selection: Literal["global", "per_class"] = "global",
        detach_reference_in_anchor: bool = True,
        detach_reference_in_center: bool = True,
        normalize_embeddings: bool = False,
        min_class_mass: float = 0.0,
        sync_references: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; SHTA needs background and at least one foreground class")
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        if not 0 < hard_ratio <= 1:
            raise ValueError(f"hard_ratio is {hard_ratio}; it must be in (0, 1]")
        if selection not in ("global", "per_class"):
            raise ValueError(f"selection is {selection!r}; it must be 'global' or 'per_class'")
        if sync_references and not (detach_reference_in_anchor and detach_reference_in_center):
            raise ValueError("sync_references needs both references detached: gradients do not cross ranks")
        self.num_classes = num_classes
        self.temperature = temperature
        self.conf_threshold = conf_threshold
        self.fg_threshold = fg_threshold
        self.purity_threshold = purity_threshold
        self.hard_ratio = hard_ratio
        self.matched_hard = matched_hard
        self.assign_weight = assign_weight
        self.anchor_weight = anchor_weight
        self.hard_weight = hard_weight
        self.center_weight = center_weight
        self.selection = selection
        self.detach_reference_in_anchor = detach_reference_in_anchor
        self.detach_reference_in_center = detach_reference_in_center
        self.normalize_embeddings = normalize_embeddings
        self.min_class_mass = min_class_mass
        self.sync_references = sync_references
        self.eps = eps
        self.proxies = nn.Parameter(F.normalize(torch.randn(num_classes, embedding_dim), dim=1))
        self.proxies.no_weight_decay = True  # only their direction matters

    def forward(self, z: Tensor, y_tok: Tensor) -> SHTATerms:
        """Compute the losses of one batch of tokens, in fp32 whatever autocast says.

        Args:
            z: ``[N, C_z]`` token embeddings, any float type.
            y_tok: ``[N, K]`` class shares; rows sum to 1, or are 0 for tokens outside Omega_l.

        Returns:
            The terms, see :class:`SHTATerms`.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self._losses(z.float(), y_tok.float())

    def _losses(self, z: Tensor, y_tok: Tensor) -> SHTATerms:
        in_omega_l = y_tok.sum(1) > 0
        num_tokens = in_omega_l.sum()

        # Semantic assignment
        log_q = self.log_assignment(z)  # Eq. 3
        if self.normalize_embeddings:
            z = F.normalize(z, dim=1)
        reference, mass = self._class_references(z, y_tok)  # Eq. 4
        present = mass > self.min_class_mass  # K'
        assign = masked_mean(-(y_tok * log_q).sum(1), in_omega_l)  # Eq. 5
        anchor_reference = reference.detach() if self.detach_reference_in_anchor else reference
        proxy_cosine = F.cosine_similarity(anchor_reference, self.proxies, dim=1)
        anchor = masked_mean(1 - proxy_cosine, present)  # Eq. 5

        # Hard token refinement
        eligible, dominant = self.eligible(y_tok)
        with torch.no_grad():
            confidence = log_q.exp().amax(1)  # h_i, Eq. 6
            candidates = eligible & (self.matched_hard | (confidence >= self.conf_threshold))
            hard_set = self._top_share(candidates, confidence, dominant)  # Eq. 7
        hard = masked_mean(F.nll_loss(log_q, dominant, reduction="none"), hard_set)  # Eq. 8

        # Semantic center alignment. The "embedding after correction" is z of this same forward pass: the correction
        # is the gradient step that follows, and the paper describes no second pass.
        members = F.one_hot(dominant, self.num_classes) * hard_set[:, None]  # Omega_k
        num_members = members.sum(0)
        centers = members.to(z.dtype).T @ z / num_members.clamp(min=1)[:, None]  # Eq. 9
        has_center = num_members > 0  # K_h
        center_reference = reference.detach() if self.detach_reference_in_center else reference
        center = masked_mean(1 - F.cosine_similarity(centers, center_reference, dim=1), has_center)  # Eq. 10

        total = (
            self.assign_weight * assign
            + self.anchor_weight * anchor
            + self.hard_weight * hard
            + self.center_weight * center
        )  # Eq. 11

        with torch.no_grad():
            gap = (F.normalize(centers, dim=1) - F.normalize(reference, dim=1)).norm(dim=1)
            correct = (log_q.argmax(1) == y_tok.argmax(1)).to(z.dtype)
            num_candidates, num_hard = candidates.sum(), hard_set.sum()
            return SHTATerms(
                assign,
                anchor,
                hard,
                center,
                total,
                num_candidates=num_candidates.float(),
                num_hard=num_hard.float(),
                hard_ratio=num_hard / num_tokens.clamp(min=1),
                candidate_ratio=num_candidates / num_tokens.clamp(min=1),
                token_accuracy=masked_mean(correct, in_omega_l),
                proxy_cosine=masked_mean(proxy_cosine, present),
                center_gap=masked_mean(gap, has_center),
            )

    def log_assignment(self, z: Tensor) -> Tensor:
        """Eq. 3: log q ``[N, K]`` of embeddings z ``[N, C_z]``, by their cosine similarity to the proxies."""
        return F.log_softmax(F.normalize(z, dim=1) @ F.normalize(self.proxies, dim=1).T / self.temperature, 1)

    def eligible(self, y_tok: Tensor) -> tuple[Tensor, Tensor]:
        """What Eq. 7 asks of the labels alone, and y_i of Eq. 8.

        Args:
            y_tok: ``[N, K]`` class shares.

        Returns:
            A mask ``[N]`` of the tokens that are foreground enough and pure enough, and the most frequent foreground
            class ``[N]`` of every token.
        """
        dominant_share, dominant = y_tok[:, 1:].max(1)
        mask = (
            (y_tok.sum(1) > 0)
            & (y_tok[:, 1:].sum(1) >= self.fg_threshold)  # m_i
            & (dominant_share >= self.purity_threshold)  # p_i
        )
        return mask, dominant + 1

    def _class_references(self, z: Tensor, y_tok: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4: c_k ``[K, C_z]`` and the mass ``[K]`` of each class in tokens."""
        weighted_sum, mass = y_tok.T @ z, y_tok.sum(0)
        if self.sync_references and dist.is_available() and dist.is_initialized():
            weighted_sum, mass = weighted_sum.detach().clone(), mass.clone()
            dist.all_reduce(weighted_sum)
            dist.all_reduce(mass)
        return weighted_sum / (mass[:, None] + self.eps), mass

    def _top_share(self, candidates: Tensor, confidence: Tensor, dominant: Tensor) -> Tensor:
        """Top_r of Eq. 7: the most confident share r of the candidates, as a mask ``[N]``."""
        if self.selection == "global":
            return top_share(candidates, confidence, self.hard_ratio)
        hard_set = torch.zeros_like(candidates)
        for k in range(1, self.num_classes):
            hard_set |= top_share(candidates & (dominant == k), confidence, self.hard_ratio)
        return hard_set


def top_share(mask: Tensor, score: Tensor, share: float) -> Tensor:
    """The ``ceil(share * count)`` entries of ``mask`` with the highest score, without reading the count on the CPU.

    Args:
        mask: ``[N]`` bool.
        score: ``[N]`` float; ties are broken by position.
        share: in (0, 1].

    Returns:
        ``[N]`` bool, a subset of ``mask``.
    """
    exact = Fraction(share).limit_denominator(1_000_000)  # in integers, ceil(0.1 * 30) is 3
    wanted = (mask.sum() * exact.numerator + exact.denominator - 1) // exact.denominator
    order = score.masked_fill(~mask, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return mask & (rank < wanted)
