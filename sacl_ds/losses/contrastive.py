"""Similarity-regulated contrastive learning (Jiang et al., ACL 2023, Eq. 4-9): the dense reference.

For image anchor i, with c_ij = <image_i, text_j>, z_ij = logit_scale * c_ij and Neg(i) the other pairs of the global
batch that share no id with i:

    s_ij = alpha * exp(kappa_t * teacher c_ij) + (1 - alpha) * exp(kappa * c_ij)
    w_ij = |Neg(i)| * (1 / s_ij) / sum_{k in Neg(i)} 1 / s_ik          (constant for the gradient; mean 1)
    L_i  = log(e^{z_ii} + sum_{j in Neg(i)} w_ij e^{z_ij}) - z_ii

and likewise over columns for text anchors. Weights that are all 1 give InfoNCE. This file is the specification that
faster backends are held to; it keeps the whole (pairs of this rank) x (global batch) matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sacl_ds.distributed import Group, gather_rows, gather_rows_with_grad, rank, row_counts, sum_over_ranks, world_size

BACKENDS = ("auto", "reference")


@dataclass(frozen=True)
class ContrastiveOutput:
    """What `similarity_regulated_loss` returns.

    loss: 0-dim, (world / global pairs) * sum over this rank's anchors of the mean of both directions, so that the
        mean over ranks of its gradients is the gradient of one process that holds the whole batch.
    image_to_text, text_to_image: (b,) per-anchor losses, detached.
    statistics: None unless asked for; 0-dim tensors, equal on all ranks, means over all anchors and both directions
        (see `similarity_regulated_loss`).
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    statistics: dict[str, Tensor] | None = None


def regulation_weights(similarity: Tensor, negatives: Tensor) -> Tensor:
    """Weights of the negatives of each anchor (paper Eq. 6 and 9): inverse similarity, normalised to mean 1.

    similarity: (n, m) s_ij > 0, float; negatives: (n, m) bool. Returns (n, m): 0 outside the mask; inside, positive,
    falling as similarity rises, with mean 1 over each row's negatives. A row without negatives is all 0.
    """
    if similarity.shape != negatives.shape or similarity.ndim != 2:
        raise ValueError(
            f"similarity and negatives must be (n, m) alike, got {tuple(similarity.shape)} and {tuple(negatives.shape)}"
        )
    return _log_weights(similarity.log(), negatives).exp()


def similarity_regulated_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    alpha: float = 0.0,
    sharpness: float = 1.0,
    teacher_sharpness: float | None = None,
    pair_ids: Tensor | None = None,
    negative_mass: float = 1.0,
    drop_below: float | None = None,
    group: Group = None,
    backend: str = "auto",
    statistics: bool = False,
) -> ContrastiveOutput:
    """Image-text contrastive loss whose negatives are weighted by inverse similarity (module docstring).

    image, text: (b, d) this rank's features, L2-normalised, row i of both is pair i; b may differ between ranks.
        Any float dtype; the loss is computed in float32, or float64 for float64 inputs.
    logit_scale: 0-dim tensor, 1 / temperature.
    teacher_image, teacher_text: (b, d_t) frozen features, L2-normalised; needed where alpha > 0.
    alpha: the teacher's share of the similarity, in [0, 1].
    sharpness: kappa; 0 gives InfoNCE (with teacher_sharpness 0 or None). 1 is the paper to the letter.
    teacher_sharpness: kappa_t; None means sharpness.
    pair_ids: (b,) or (b, k) int64; two pairs equal in any column are not negatives of each other.
    negative_mass: mean weight of the negatives; 1 is the paper's condition 2, other values are for controls.
    drop_below: negatives whose mean-1 weight is less are removed and the others count 1 (paper section 4.3).
    group: process group; None is the default one where it is initialised, else one process.
    statistics: also return, for the whole global batch: `pmi_positive` and `pmi_negative`, the critic's mean
        pointwise mutual information over positives and over negatives; `pmi_negative_target`, mean log(1/w), which
        the paper's heuristic says pmi_negative approaches; `infonce_bound`, log(1 + negatives) - InfoNCE loss;
        `negative_mass_log`, how much the weights shift the log-sum of the negatives; `negatives`, per anchor.

    Raises ValueError for shapes or settings that do not fit.
    """
    teacher = _checked_teacher(image, text, teacher_image, teacher_text, alpha)
    _check_settings(sharpness, teacher_sharpness, negative_mass, drop_below, backend)
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    with torch.autocast(image.device.type, enabled=False):
        counts = row_counts(image, group)
        start = sum(counts[: rank(group)])
        image, text = image.to(dtype), text.to(dtype)
        both = gather_rows_with_grad(torch.cat([image, text], 1), counts, group)
        all_image, all_text = both.split(image.shape[1], 1)
        negatives = _negatives(len(image), start, pair_ids, counts, group, image.device)
        kappa_t = sharpness if teacher_sharpness is None else teacher_sharpness

        teacher_rows: tuple[Tensor | None, Tensor | None] = (None, None)
        if teacher is not None:
            t_image, t_text = (features.detach().to(dtype) for features in teacher)
            all_t = gather_rows(torch.cat([t_image, t_text], 1), counts, group)
            all_t_image, all_t_text = all_t.split(t_image.shape[1], 1)
            teacher_rows = (t_image @ all_t_text.T, t_text @ all_t_image.T)

        cosines = (image @ all_text.T, text @ all_image.T)
        losses: list[Tensor] = []
        figures: list[dict[str, Tensor]] = []
        for cosine, teacher_cosine in zip(cosines, teacher_rows, strict=True):
            log_similarity = _log_similarity(cosine.detach(), teacher_cosine, alpha, sharpness, kappa_t)
            log_weights = _log_weights(log_similarity, negatives)
            if drop_below is not None:
                kept = negatives & (log_weights >= math.log(drop_below))
                log_weights = torch.zeros_like(log_weights).masked_fill(~kept, -torch.inf)
            log_weights = log_weights + math.log(negative_mass)
            logits = cosine * logit_scale.to(dtype)
            losses.append(_anchor_losses(logits, log_weights, start))
            if statistics:
                figures.append(_anchor_statistics(logits.detach(), log_weights, negatives, start))

    own = 0.5 * (losses[0] + losses[1]).sum()
    return ContrastiveOutput(
        loss=own * (world_size(group) / sum(counts)),
        image_to_text=losses[0].detach(),
        text_to_image=losses[1].detach(),
        statistics=_global_statistics(figures, group) if statistics else None,
    )


def _checked_teacher(
    image: Tensor, text: Tensor, teacher_image: Tensor | None, teacher_text: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor] | None:
    """The teacher's features where they count, after checking that everything fits together."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image and text must be (b, d) alike, got {tuple(image.shape)} and {tuple(text.shape)}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]")
    if (teacher_image is None) != (teacher_text is None):
        raise ValueError("teacher_image and teacher_text come together or not at all")
    if teacher_image is None or teacher_text is None:
        if alpha > 0:
            raise ValueError(f"alpha={alpha} needs teacher_image and teacher_text")
        return None
    if teacher_image.shape != teacher_text.shape or len(teacher_image) != len(image):
        raise ValueError(
            f"teacher features must be (b={len(image)}, d_t) alike, "
            f"got {tuple(teacher_image.shape)} and {tuple(teacher_text.shape)}"
        )
    return (teacher_image, teacher_text) if alpha > 0 else None


def _check_settings(
    sharpness: float, teacher_sharpness: float | None, negative_mass: float, drop_below: float | None, backend: str
) -> None:
    if sharpness < 0 or (teacher_sharpness is not None and teacher_sharpness < 0):
        raise ValueError(f"sharpness={sharpness}, teacher_sharpness={teacher_sharpness}: must not be negative")
    if negative_mass <= 0:
        raise ValueError(f"negative_mass={negative_mass} must be positive")
    if drop_below is not None and drop_below <= 0:
        raise ValueError(f"drop_below={drop_below} must be positive; None removes nothing")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")


def _negatives(
    rows: int, start: int, pair_ids: Tensor | None, counts: list[int], group: Group, device: torch.device
) -> Tensor:
    """(rows, global batch) bool: which pairs are negatives of this rank's pairs."""
    columns = torch.arange(sum(counts), device=device)
    mask = columns[None, :] != (start + columns[:rows])[:, None]
    if pair_ids is None:
        return mask
    if pair_ids.ndim not in (1, 2) or len(pair_ids) != rows:
        raise ValueError(f"pair_ids must be ({rows},) or ({rows}, k), got {tuple(pair_ids.shape)}")
    ids = pair_ids.view(rows, -1)
    everyone = gather_rows(ids, counts, group)
    for column in range(ids.shape[1]):
        mask &= ids[:, column, None] != everyone[None, :, column]
    return mask


def _log_similarity(
    cosine: Tensor, teacher_cosine: Tensor | None, alpha: float, sharpness: float, teacher_sharpness: float
) -> Tensor:
    """log s_ij of Eq. 5 with sharpness; in logarithms, since exp(kappa) leaves float32 at kappa = 89."""
    if teacher_cosine is None:
        return sharpness * cosine
    if alpha == 1.0:
        return teacher_sharpness * teacher_cosine
    return torch.logaddexp(
        math.log(alpha) + teacher_sharpness * teacher_cosine, math.log1p(-alpha) + sharpness * cosine
    )


def _log_weights(log_similarity: Tensor, negatives: Tensor) -> Tensor:
    """(n, m) log w_ij: -inf outside the mask, mean weight 1 inside it."""
    count = negatives.sum(1, keepdim=True).to(log_similarity.dtype)  # the logarithm of an int64 is float32
    inverse = (-log_similarity).masked_fill(~negatives, -torch.inf)
    normaliser = inverse.logsumexp(1, keepdim=True) - count.log()
    # a row without negatives has -inf - (-inf) here
    return (inverse - normaliser).masked_fill(~negatives, -torch.inf)


def _anchor_losses(logits: Tensor, log_weights: Tensor, start: int) -> Tensor:
    """(rows,) L_i; 0 for an anchor without negatives.

    softplus of a difference, not a difference of two logsumexps: float32 would round a small loss away.
    """
    own = logits.diagonal(start)
    alone = ~(log_weights > -torch.inf).any(1)
    # logsumexp over nothing but -inf has a NaN gradient, even where its result is thrown away
    terms = (logits + log_weights).masked_fill(alone[:, None], 0.0)
    return torch.nn.functional.softplus(terms.logsumexp(1) - own, threshold=80.0).masked_fill(alone, 0.0)


@torch.no_grad()
def _anchor_statistics(logits: Tensor, log_weights: Tensor, negatives: Tensor, start: int) -> dict[str, Tensor]:
    """Sums over this rank's anchors (and pairs of anchor and negative) of one direction; see `_global_statistics`."""
    kept = negatives & (log_weights > -torch.inf)
    count = kept.sum(1).to(logits.dtype)
    own = logits.diagonal(start)
    regulated = (logits + log_weights).masked_fill(~kept, -torch.inf).logsumexp(1)
    plain = logits.masked_fill(~kept, -torch.inf).logsumexp(1)
    log_mean = torch.logaddexp(own, regulated) - (1 + count).log()
    log_w = log_weights.masked_fill(~kept, 0.0)
    pmi = ((logits - log_mean[:, None]).masked_fill(~kept, 0.0) + log_w).sum()
    has = count > 0
    return {
        "anchors": torch.as_tensor(float(len(logits)), device=logits.device),
        "pairs": count.sum(),
        "with_negatives": has.sum().to(logits.dtype),
        "pmi_positive": (own - log_mean).sum(),
        "pmi_negative": pmi,
        "pmi_negative_target": -log_w.sum(),
        "infonce_bound": ((1 + count).log() - torch.nn.functional.softplus(plain - own)).sum(),
        "negative_mass_log": (regulated - plain).masked_fill(~has, 0.0).sum(),
    }


def _global_statistics(figures: list[dict[str, Tensor]], group: Group) -> dict[str, Tensor]:
    names = list(figures[0])
    sums = torch.stack([sum((part[name].double() for part in figures), torch.zeros(())) for name in names])
    total = dict(zip(names, sum_over_ranks(sums, group), strict=True))
    per = {
        "pmi_positive": "anchors",
        "infonce_bound": "anchors",
        "negative_mass_log": "with_negatives",
        "pmi_negative": "pairs",
        "pmi_negative_target": "pairs",
    }
    means = {name: total[name] / total[base].clamp(min=1) for name, base in per.items()}
    return means | {"negatives": total["pairs"] / total["anchors"].clamp(min=1)}
