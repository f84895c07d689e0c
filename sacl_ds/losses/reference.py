"""The dense reference: the loss as its equations read, with the whole (pairs of this rank) x (global batch) matrix.

This is the specification that faster backends are held to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sacl_ds.distributed import Group, gather_rows, gather_rows_with_grad, rank, row_counts, world_size
from sacl_ds.losses.keys import Keys
from sacl_ds.losses.regulation import Regulation


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


def dense_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    pair_ids: Tensor | None,
    regulation: Regulation,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (0-dim) and losses of this rank's anchors, (b,) of images and of texts; arguments as in
    `similarity_regulated_loss`."""
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    counts = row_counts(image, group)
    start = sum(counts[: rank(group)])
    image, text = image.to(dtype), text.to(dtype)
    both = gather_rows_with_grad(torch.cat([image, text], 1), counts, group)
    all_image, all_text = both.split(image.shape[1], 1)
    negatives = _negatives(len(image), start, pair_ids, counts, group, image.device)

    teacher_rows: tuple[Tensor | None, Tensor | None] = (None, None)
    if teacher is not None:
        t_image, t_text = (features.detach().to(dtype) for features in teacher)
        all_t = gather_rows(torch.cat([t_image, t_text], 1), counts, group)
        all_t_image, all_t_text = all_t.split(t_image.shape[1], 1)
        teacher_rows = (t_image @ all_t_text.T, t_text @ all_t_image.T)

    losses: list[Tensor] = []
    for cosine, teacher_cosine in zip((image @ all_text.T, text @ all_image.T), teacher_rows, strict=True):
        log_weights = _regulated(regulation.log_similarity(cosine.detach(), teacher_cosine), negatives, regulation)
        log_weights = log_weights + math.log(regulation.negative_mass)
        losses.append(_anchor_losses(cosine * logit_scale.to(dtype), log_weights, start))
    own = 0.5 * (losses[0] + losses[1]).sum()
    return own * (world_size(group) / sum(counts)), losses[0].detach(), losses[1].detach()


def dense_keys_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    pair_ids: Tensor | None,
    keys: Keys,
    regulation: Regulation,
    group: Group,
    soft_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dense_loss` against separate keys, and with the momentum model's soft targets."""
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    counts = row_counts(image, group)
    start = sum(counts[: rank(group)])
    negatives = _negatives(len(image), start, pair_ids, counts, group, image.device)
    n = negatives.shape[1]
    if keys.queue_text is not None:
        earlier = negatives.new_ones(len(image), len(keys.queue_text))
        if pair_ids is not None and keys.queue_ids is not None:
            mine, theirs = pair_ids.view(len(image), -1), keys.queue_ids.view(len(keys.queue_text), -1)
            earlier = ~(mine[:, None] == theirs[None]).any(-1)
        negatives = torch.cat([negatives, earlier], 1)

    def direction(
        anchor: Tensor,
        momentum: Tensor,
        key: Tensor,
        queue: Tensor | None,
        mine: Tensor | None,
        theirs: Tensor | None,
        old: Tensor | None,
    ) -> Tensor:
        columns = [gather_rows(key, counts, group)] + ([] if queue is None else [queue])
        every_key = torch.cat(columns).detach().to(dtype)
        cosine = anchor.to(dtype) @ every_key.T
        of_teacher = None
        if mine is not None and theirs is not None:
            columns = [gather_rows(theirs, counts, group)]
            if queue is not None:  # an unregulated queue needs no teacher: any similarity does
                columns.append(theirs.new_zeros(len(queue), theirs.shape[1]) if old is None else old)
            of_teacher = mine.to(dtype) @ torch.cat(columns).to(dtype).T
        log_similarity = regulation.log_similarity(cosine.detach(), of_teacher)
        together = [negatives] if keys.regulate_queue else list(negatives.split([n, negatives.shape[1] - n], 1))
        log_weights = [_regulated(log_similarity[:, : together[0].shape[1]], together[0], regulation)]
        if len(together) > 1:
            log_weights.append(torch.zeros_like(cosine[:, n:]).masked_fill(~together[1], -torch.inf))
        every = torch.cat(log_weights, 1) + math.log(regulation.negative_mass)
        logits = cosine * logit_scale.to(dtype)
        hard = _anchor_losses(logits, every, start)
        if soft_weight == 0:
            return hard
        believed = momentum.detach().to(dtype) @ every_key.T * logit_scale.detach().to(dtype)
        return (1 - soft_weight) * hard + soft_weight * _soft_losses(logits, believed, negatives, start)

    t_image, t_text = teacher or (None, None)
    of_images = direction(image, keys.image, keys.text, keys.queue_text, t_image, t_text, keys.queue_teacher_text)
    of_texts = direction(text, keys.text, keys.image, keys.queue_image, t_text, t_image, keys.queue_teacher_image)
    own = 0.5 * (of_images + of_texts).sum()
    return own * (world_size(group) / sum(counts)), of_images.detach(), of_texts.detach()


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


def _regulated(log_similarity: Tensor, negatives: Tensor, regulation: Regulation) -> Tensor:
    """(n, m) log w_ij before negative_mass: -inf outside the mask and for dropped negatives."""
    log_weights = _log_weights(log_similarity, negatives)
    if regulation.drop_below is None:
        return log_weights
    kept = negatives & (log_weights >= math.log(regulation.drop_below))
    return torch.zeros_like(log_weights).masked_fill(~kept, -torch.inf)


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


def _soft_losses(logits: Tensor, believed: Tensor, negatives: Tensor, start: int) -> Tensor:
    """(rows,) cross-entropy of softmax(logits) with softmax(believed) as its target, over each anchor's own key and its
    negatives; (rows, m) all."""
    candidates = negatives.clone()
    candidates.diagonal(start).fill_(True)
    q = believed.masked_fill(~candidates, -torch.inf).softmax(1)
    log_p = logits.masked_fill(~candidates, -torch.inf).log_softmax(1)
    return -(q * log_p.masked_fill(~candidates, 0.0)).sum(1)
