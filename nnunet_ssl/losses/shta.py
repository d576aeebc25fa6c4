"""SHTA: Semantic Hard Token correction and center Alignment.

Source: Zhang, Zhong, Zhang, Liu, "SHTA: Semantic Hard Token Correction and Center Alignment for Semi-Supervised
Medical Image Segmentation". Equation numbers are the paper's. Its code was not available to us; where the paper leaves
a choice open, the choice is a named setting, of :class:`SHTALossSettings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.declared import Part, Positive, Share, Weight, declared, setting
from nnunet_ssl.losses.class_counts import class_counts
from nnunet_ssl.losses.masked import masked_mean


@declared
class SHTALossSettings:
    """Settings of the losses, under the names that they have as settings of a trainer."""

    shta_min_valid_fraction: Share = setting(
        0.5, "Tokens in which a smaller share of the voxels is not ignored are left out"
    )
    # Table IV (correction loss 0.054 at K = 14) excludes values above 0.2 to 0.37
    shta_temperature: Positive = setting(0.1, "Temperature in Eq. 3", symbol="tau_sa")
    # 0 does not bind: Table IV's equal supply in two settings whose q differ says that the paper's does not either
    shta_conf_threshold: Share = setting(0.0, "Threshold in Eq. 7 for the confidence", symbol="T_conf")
    shta_fg_threshold: Share = setting(0.5, "Threshold in Eq. 7 for the share of foreground", symbol="T_fg")
    shta_purity_threshold: Share = setting(
        0.5, "Threshold in Eq. 7 for the share of the most frequent foreground class", symbol="T_pur"
    )
    # of 8 to 10 % eligible tokens, 3.8 % were selected
    shta_hard_ratio: Part = setting(0.5, "Share of the candidates that Eq. 7 selects, rounded up", symbol="r")
    # so losses of different settings are means over equally many tokens ("matched-hard", Table IV)
    shta_matched_hard: bool = setting(
        False, "Candidates follow from labels alone, without T_conf, so every ablation selects equally many tokens"
    )
    shta_selection: Literal["global", "per_class"] = setting(  # Eq. 7 names one set
        "global", '`"global"` ranks all candidates together, `"per_class"` takes the share within each class'
    )
    shta_assign_weight: Weight = setting(1.0, "Weight of L_assign in Eq. 11", symbol="alpha_as")
    shta_anchor_weight: Weight = setting(1.0, "Weight of L_anchor", symbol="alpha_a")
    shta_hard_weight: Weight = setting(1.0, "Weight of L_hard", symbol="alpha_h")
    shta_center_weight: Weight = setting(1.0, "Weight of L_center", symbol="alpha_c")
    # L_anchor "calibrates" the proxies, so it moves them alone
    shta_detach_reference_in_anchor: bool = setting(True, "No gradient through the class means in Eq. 5")
    shta_detach_reference_in_center: bool = setting(True, "No gradient through the class means in Eq. 10")
    shta_normalize_embeddings: bool = setting(False, "Unit embeddings in Eq. 4 and 9, where the paper has raw ones")
    shta_min_class_mass: Weight = setting(0.0, "Mass of a class, in tokens, above which it counts as present in Eq. 4")
    # gradients do not cross ranks, and Omega_hard is each rank's own
    shta_sync_references: bool = setting(
        True, "Sum Eq. 4 over the GPUs of a run, as long as neither reference has a gradient"
    )


DEFAULTS = SHTALossSettings()


def token_class_distribution(
    labels: Tensor,
    stride: Sequence[int],
    num_classes: int,
    ignore_label: int | None = None,
    min_valid_fraction: float = DEFAULTS.shta_min_valid_fraction,
) -> tuple[Tensor, Tensor]:
    """TokDist of Eq. 1: the share of each class among the voxels of each token, exactly.

    The voxels of a token are counted per class; no one-hot map of the patch is made.

    Args:
        labels: ``[B, *spatial]`` of any integer type, 2D or 3D, values in ``0 .. num_classes - 1`` or ``ignore_label``.
            Other negative values (nnU-Net's padding) count as background, as they do in nnU-Net's own loss.
        stride: voxels per token along each axis; each must divide its axis.
        num_classes: K, with background.
        ignore_label: voxels with this value are not counted, and the rest of the token is renormalized.
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
    """What SHTA says of one batch. Losses carry gradients; the readouts are detached. All are float32."""

    assign: Tensor  # L_assign, Eq. 5
    anchor: Tensor  # L_anchor, Eq. 5
    hard: Tensor  # L_hard, Eq. 8
    center: Tensor  # L_center, Eq. 10
    total: Tensor  # L_SHTA, Eq. 11
    num_candidates: Tensor  # |Omega_cand|
    num_hard: Tensor  # |Omega_hard|
    candidate_share: Tensor  # |Omega_cand| / |Omega_l|
    hard_share: Tensor  # |Omega_hard| / |Omega_l|, the supply of Table IV
    num_references: Tensor  # |K'|
    num_centers: Tensor  # |K_h|
    token_accuracy: Tensor  # share of tokens whose most likely proxy is their most frequent class
    proxy_cosine: Tensor  # mean cos(c_k, mu_k) over K'
    center_gap: Tensor  # mean Euclidean distance of unit centers to unit references over K_h (Table IV, our reading)
    candidates_of_class: Tensor  # [K], tokens of Omega_cand whose most frequent foreground class is k; 0 for background
    hard_of_class: Tensor  # [K], |Omega_k|


class SHTALoss(nn.Module):
    """The three SHTA losses on token embeddings, with the class proxies that they learn (Eq. 3 to 11).

    A token whose row of ``y_tok`` is all zero is not in Omega_l (it is unlabeled or mostly ignored) and takes no part.
    Every set may be empty: a mean over an empty set is 0 with zero gradient, so that each parameter gets a gradient on
    every rank at every step. No value is read back to the CPU.

    Args:
        num_classes: K, with background as class 0.
        embedding_dim: C_z.
        settings: thresholds, weights and choices.
        eps: epsilon of Eq. 4 (Eq. 5's is replaced by a log-softmax, which needs none).

    Attributes:
        proxies: ``[K, C_z]`` parameter mu, unit length at the start, normalized on use.

    Raises:
        ValueError: for fewer than two classes.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        settings: SHTALossSettings = DEFAULTS,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; SHTA needs background and at least one foreground class")
        self.num_classes = num_classes
        self.settings = settings
        self.temperature = settings.shta_temperature
        self.eps = eps
        self.proxies = nn.Parameter(F.normalize(torch.randn(num_classes, embedding_dim), dim=1))
        self.proxies.no_weight_decay = True  # type: ignore[attr-defined]  # only their direction matters

    def forward(self, z: Tensor, y_tok: Tensor) -> SHTATerms:
        """Compute the losses of one batch of tokens, in fp32 regardless of autocast.

        Args:
            z: ``[N, C_z]`` token embeddings, any float type.
            y_tok: ``[N, K]`` class shares; rows sum to 1, or are 0 for tokens outside Omega_l.

        Returns:
            The terms, see :class:`SHTATerms`.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self._losses(z.float(), y_tok.float())

    def _losses(self, z: Tensor, Y: Tensor) -> SHTATerms:
        settings, omega_l = self.settings, Y.sum(1) > 0

        # Eq. 3 to 5: q from cosines to the proxies, class references, L_assign and L_anchor
        s = self._scores(z)
        log_q = F.log_softmax(s, 1)
        c, mass = self._class_references(z, Y)
        present = mass > settings.shta_min_class_mass  # K'
        cosine = F.cosine_similarity(c.detach() if settings.shta_detach_reference_in_anchor else c, self.proxies, dim=1)
        assign, anchor = masked_mean(-(Y * log_q).sum(1), omega_l), masked_mean(1 - cosine, present)

        # Eq. 6 to 8: the most confident eligible tokens, and the cross-entropy to their class
        eligible, y = self.eligible(Y)
        with torch.no_grad():
            confidence = confidence_logit(s)  # orders as h_i does
            sure = settings.shta_matched_hard | (confidence.sigmoid() >= settings.shta_conf_threshold)
            candidates = eligible & sure  # Omega_cand
            selected = self._top_r(candidates, confidence, y)  # Omega_hard
        hard = masked_mean(F.nll_loss(log_q, y, reduction="none"), selected)

        # Eq. 9 and 10: the mean of each class's hard tokens, drawn to the class reference. The "embedding after
        # correction" is z of this same forward pass: the correction is the gradient step that follows, and the paper
        # describes no second pass.
        members = F.one_hot(y, self.num_classes) * selected[:, None]  # Omega_k
        size = members.sum(0)
        cc = members.to(z.dtype).T @ self._embedding(z) / size.clamp(min=1)[:, None]  # Eq. 9
        drawn_to = c.detach() if settings.shta_detach_reference_in_center else c
        center = masked_mean(1 - F.cosine_similarity(cc, drawn_to, dim=1), size > 0)  # K_h, Eq. 10

        total = settings.shta_assign_weight * assign + settings.shta_anchor_weight * anchor
        total = total + settings.shta_hard_weight * hard + settings.shta_center_weight * center  # Eq. 11
        with torch.no_grad():
            num_tokens, num_candidates, num_hard = omega_l.sum(), candidates.sum(), selected.sum()
            gap = (F.normalize(cc, dim=1) - F.normalize(c, dim=1)).norm(dim=1)
            return SHTATerms(
                assign,
                anchor,
                hard,
                center,
                total,
                num_candidates=num_candidates.float(),
                num_hard=num_hard.float(),
                candidate_share=num_candidates / num_tokens.clamp(min=1),
                hard_share=num_hard / num_tokens.clamp(min=1),
                num_references=present.sum().float(),
                num_centers=(size > 0).sum().float(),
                token_accuracy=masked_mean((log_q.argmax(1) == Y.argmax(1)).float(), omega_l),
                proxy_cosine=masked_mean(cosine, present),
                center_gap=masked_mean(gap, size > 0),
                candidates_of_class=class_counts(y, self.num_classes, candidates),
                hard_of_class=size.float(),
            )

    def _embedding(self, z: Tensor) -> Tensor:
        """z as Eq. 4 and 9 take it."""
        return F.normalize(z, dim=1) if self.settings.shta_normalize_embeddings else z

    def _scores(self, z: Tensor) -> Tensor:
        """s of Eq. 3, ``[N, K]``."""
        return F.normalize(z, dim=1) @ F.normalize(self.proxies, dim=1).T / self.temperature

    def log_assignment(self, z: Tensor) -> Tensor:
        """Eq. 3: log q ``[N, K]`` of embeddings z ``[N, C_z]``, by their cosine similarity to the proxies."""
        return F.log_softmax(self._scores(z), 1)

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
            & (y_tok[:, 1:].sum(1) >= self.settings.shta_fg_threshold)  # m_i
            & (dominant_share >= self.settings.shta_purity_threshold)  # p_i
        )
        return mask, dominant + 1

    def _class_references(self, z: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4: c_k ``[K, C_z]`` and the mass ``[K]`` of each class in tokens, of all ranks where they are synced."""
        weighted_sum, mass = Y.T @ self._embedding(z), Y.sum(0)
        detached = self.settings.shta_detach_reference_in_anchor and self.settings.shta_detach_reference_in_center
        if self.settings.shta_sync_references and detached and dist.is_available() and dist.is_initialized():
            weighted_sum, mass = weighted_sum.detach().clone(), mass.clone()
            dist.all_reduce(weighted_sum)
            dist.all_reduce(mass)
        return weighted_sum / (mass[:, None] + self.eps), mass

    def _top_r(self, candidates: Tensor, confidence: Tensor, y: Tensor) -> Tensor:
        """Top_r of Eq. 7: the most confident share r of the candidates, as a mask ``[N]``."""
        if self.settings.shta_selection == "global":
            return top_share(candidates, confidence, self.settings.shta_hard_ratio)
        selected = torch.zeros_like(candidates)
        for k in range(1, self.num_classes):
            selected |= top_share(candidates & (y == k), confidence, self.settings.shta_hard_ratio)
        return selected


def confidence_logit(s: Tensor) -> Tensor:
    """The logit of h_i (Eq. 6): how far the largest score is above the log-sum-exp of the others.

    It orders tokens as ``h_i = max_k q_{i,k} = sigmoid(logit)`` does. But h_i is exactly 1 in single precision for most
    tokens once two classes at a small temperature are learned, and such ties would go to the first image of the batch.

    Args:
        s: ``[N, K]`` scores of Eq. 3, K at least 2.

    Returns:
        ``[N]``.
    """
    largest, at = s.max(1)
    others = s.scatter(1, at[:, None], -torch.inf)
    return largest - others.logsumexp(1)


def top_share(mask: Tensor, score: Tensor, share: float) -> Tensor:
    """The ``ceil(share * count)`` entries of ``mask`` with the highest score, without reading the count on the CPU.

    At least one, where ``mask`` has one.

    Args:
        mask: ``[N]`` bool.
        score: ``[N]`` float; ties are broken by position.
        share: in (0, 1].

    Returns:
        ``[N]`` bool, a subset of ``mask``.
    """
    exact = Fraction(share).limit_denominator(1_000_000)  # in integers, ceil(0.1 * 30) is 3
    wanted = ((mask.sum() * exact.numerator + exact.denominator - 1) // exact.denominator).clamp(min=1)
    order = score.masked_fill(~mask, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return mask & (rank < wanted)
