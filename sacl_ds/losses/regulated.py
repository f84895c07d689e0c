"""Similarity-regulated contrastive learning (Jiang et al., ACL 2023, Eq. 4-9): equations, dense form, public loss.

For image anchor i, with c_ij = <image_i, text_j>, z_ij = logit_scale * c_ij and Neg(i) the other pairs of the global
batch that share no id with i:

    s_ij = alpha * exp(kappa_t * teacher c_ij) + (1 - alpha) * exp(kappa * c_ij)
    w_ij = |Neg(i)| * (1 / s_ij) / sum_{k in Neg(i)} 1 / s_ik          (constant for the gradient; mean 1)
    L_i  = log(e^{z_ii} + sum_{j in Neg(i)} w_ij e^{z_ij}) - z_ii

and likewise over columns for text anchors. Weights that are all 1 give InfoNCE.

`dense_loss` computes this as it reads, with the whole matrix; it is the specification that the other backends are
held to. `streaming.py` computes the same in tiles (`tiles.py` in PyTorch, `triton.py` on a GPU) without ever holding
the matrix, and `queue.py` compares with the keys of a momentum model and a queue.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sacl_ds.distributed import Group, rank, said_on_all_ranks, world_size

if TYPE_CHECKING:  # these build on Regulation
    from sacl_ds.losses.queue import Keys
    from sacl_ds.losses.streaming import GlobalBatch, Tiles

BACKENDS = ("auto", "reference", "streaming", "triton")


@dataclass(frozen=True)
class Regulation:
    """Settings of the weights w_ij = mass * |Neg(i)| * (1 / s_ij) / sum_k 1 / s_ik.

    alpha: the teacher's share of the similarity s, in [0, 1]; 0 needs no teacher.
    sharpness, teacher_sharpness: kappa of the trained model's cosine and of the teacher's; not negative.
    negative_mass: mean weight of the negatives; positive.
    drop_below: negatives whose mean-1 weight is less are removed, the others weigh 1 (paper section 4.3); or None.

    Raises ValueError for values out of range.
    """

    alpha: float = 0.0
    sharpness: float = 1.0
    teacher_sharpness: float = 1.0
    negative_mass: float = 1.0
    drop_below: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]")
        if not (0 <= self.sharpness < math.inf and 0 <= self.teacher_sharpness < math.inf):
            raise ValueError(
                f"sharpness={self.sharpness}, teacher_sharpness={self.teacher_sharpness}: must be finite, not negative"
            )
        if not 0 < self.negative_mass < math.inf:
            raise ValueError(f"negative_mass={self.negative_mass} must be positive and finite")
        if self.drop_below is not None and not 0 < self.drop_below < math.inf:
            raise ValueError(f"drop_below={self.drop_below} must be positive and finite; None removes nothing")

    @property
    def even(self) -> bool:
        """Whether all negatives weigh the same, as in InfoNCE."""
        return (self.alpha == 1.0 or self.sharpness == 0) and (self.alpha == 0.0 or self.teacher_sharpness == 0)

    @property
    def plain(self) -> bool:
        """Whether all negatives weigh 1: InfoNCE."""
        return self.even and self.negative_mass == 1.0 and self.drop_below is None

    @property
    def teacher(self) -> bool:
        """Whether the teacher's features make a difference."""
        return self.alpha > 0 and not self.even

    @property
    def steepness(self) -> float:
        """Bound of |log s_ij| for cosines in [-1, 1]."""
        return max(self.sharpness if self.alpha < 1 else 0.0, self.teacher_sharpness if self.alpha > 0 else 0.0)

    @property
    def log_shares(self) -> tuple[float, float]:
        """log alpha and log(1 - alpha), the teacher's and the student's; -inf for none. Float32 knows no alpha that is
        closer to 1 than 6e-8: what computes in it takes these."""
        return (
            math.log(self.alpha) if self.alpha > 0 else -math.inf,
            math.log1p(-self.alpha) if self.alpha < 1 else -math.inf,
        )

    @property
    def alike(self) -> dict[str, float | None]:
        """What ranks must have in common, as `row_counts` compares it."""
        return {name: value if value is None else float(value) for name, value in vars(self).items()}

    def log_similarity(self, cosine: Tensor, teacher_cosine: Tensor | None) -> Tensor:
        """log s_ij of Eq. 5 with sharpness, same shape: exp(kappa) itself leaves float32 at kappa = 89."""
        if self.even:
            return torch.zeros_like(cosine)
        if self.alpha == 0.0 or teacher_cosine is None:
            return self.sharpness * cosine
        if self.alpha == 1.0:
            return self.teacher_sharpness * teacher_cosine
        of_teacher, of_student = self.log_shares
        by_teacher = (self.teacher_sharpness * teacher_cosine).add_(of_teacher)
        by_student = (self.sharpness * cosine).add_(of_student)
        return torch.logaddexp(by_teacher, by_student, out=by_teacher)


def regulation_weights(similarity: Tensor, negatives: Tensor) -> Tensor:
    """Weights of the negatives of each anchor (paper Eq. 6 and 9): inverse similarity, normalised to mean 1.

    similarity: (n, m) s_ij > 0, float; negatives: (n, m) bool. Returns (n, m): 0 outside the mask; inside, positive,
    falling as similarity rises, with mean 1 over each row's negatives. A row without negatives is all 0.
    """
    if similarity.shape != negatives.shape or similarity.ndim != 2:
        raise ValueError(
            f"similarity and negatives must be (n, m) alike, got {tuple(similarity.shape)} and {tuple(negatives.shape)}"
        )
    return _mean_one(similarity.log(), negatives)[0].exp()


@dataclass(frozen=True)
class ContrastiveOutput:
    """What `similarity_regulated_loss` returns.

    loss: 0-dim, (world / global pairs) * sum over this rank's anchors of the mean of both directions, so that the
        mean over ranks of its gradients is the gradient of one process that holds the whole batch.
    image_to_text, text_to_image: (b,) per-anchor losses, detached.
    least_kept: with drop_below, for this rank's images and texts as anchors, (b,) float64, the least -log s_ij of a
        negative that is kept (without meaning for an anchor that has no negatives); else None.
    statistics: None unless asked for; see `sacl_ds.losses.weights.mutual_information`.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    least_kept: tuple[Tensor, Tensor] | None = None
    statistics: dict[str, Tensor] | None = None


def dense_loss(batch: GlobalBatch, logit_scale: Tensor, regulation: Regulation) -> ContrastiveOutput:
    """The loss as its equations read.

    batch: of float32 or float64 features, whose `image`, `text` and, where there is a teacher, `teacher_image` and
    `teacher_text` have been sent with gradient.
    """
    image, text = batch.image, batch.text
    every_teacher = batch.get("teacher_image"), batch.get("teacher_text")
    negatives = negatives_in_batch(batch)
    teacher_cosines: tuple[Tensor | None, Tensor | None] = (None, None)
    if batch.teacher is not None and every_teacher[0] is not None and every_teacher[1] is not None:
        t_image, t_text = batch.teacher
        teacher_cosines = (t_image @ every_teacher[1].T, t_text @ every_teacher[0].T)

    losses, least = [], []
    for cosine, teacher_cosine in zip((image @ batch["text"].T, text @ batch["image"].T), teacher_cosines, strict=True):
        log_similarity = regulation.log_similarity(cosine.detach(), teacher_cosine)
        log_weights, bound = log_weights_of(log_similarity, negatives, regulation)
        log_weights = log_weights + math.log(regulation.negative_mass)
        losses.append(anchor_losses(cosine * logit_scale.to(image.dtype), log_weights, batch.start))
        least.append(bound)
    return ContrastiveOutput(
        (losses[0] + losses[1]).sum() * batch.share,
        losses[0].detach(),
        losses[1].detach(),
        None if regulation.drop_below is None else (least[0], least[1]),
    )


def negatives_in_batch(batch: GlobalBatch) -> Tensor:
    """Mask (b, N) bool: which of all pairs are negatives of this rank's."""
    mine = slice(batch.start, batch.start + len(batch.image))
    columns = torch.arange(sum(batch.counts), device=batch.image.device)
    mask = columns[None, :] != columns[mine, None]
    if batch.ids is not None:
        for ids in batch.ids.unbind(1):
            mask &= ids[mine, None] != ids[None, :]
    return mask


def log_weights_of(log_similarity: Tensor, negatives: Tensor, regulation: Regulation) -> tuple[Tensor, Tensor]:
    """(n, m) log w_ij before negative_mass, -inf for what is no negative or dropped; and (n,) float64, the least
    -log s_ij that drop_below keeps (-inf without it)."""
    log_weights, log_mean = _mean_one(log_similarity, negatives)
    if regulation.drop_below is None:
        return log_weights, torch.full_like(log_mean, -torch.inf)
    kept = negatives & (log_weights >= math.log(regulation.drop_below))
    least = math.log(regulation.drop_below) + log_mean
    return torch.zeros_like(log_weights).masked_fill(~kept, -torch.inf), least


def _mean_one(log_similarity: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) log w_ij, -inf outside the mask and mean weight 1 inside; (n,) float64 log of the mean of 1 / s_ij."""
    count = negatives.sum(1, keepdim=True).to(log_similarity.dtype)  # the logarithm of an int64 is float32
    inverse = (-log_similarity).masked_fill(~negatives, -torch.inf)
    log_mean = inverse.logsumexp(1, keepdim=True) - count.log()
    # a row without negatives has -inf - (-inf) here
    return (inverse - log_mean).masked_fill(~negatives, -torch.inf), log_mean[:, 0].double()


def anchor_losses(logits: Tensor, log_weights: Tensor, start: int) -> Tensor:
    """(rows,) L_i, 0 for an anchor without negatives; row i's positive is in column start + i of (rows, m) both.

    softplus of a difference, not a difference of two logsumexps: float32 would round a small loss away.
    """
    own = logits.diagonal(start)
    alone = ~(log_weights > -torch.inf).any(1)
    # logsumexp over nothing but -inf has a NaN gradient, even where its result is thrown away
    terms = (logits + log_weights).masked_fill(alone[:, None], 0.0)
    return softplus(terms.logsumexp(1) - own, threshold=80.0).masked_fill(alone, 0.0)


def similarity_regulated_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
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
    keys: Keys | None = None,
    soft_weight: float = 0.0,
    counts: Sequence[int] | None = None,
) -> ContrastiveOutput:
    """Image-text contrastive loss whose negatives are weighted by inverse similarity (module docstring).

    image, text: (b, d) this rank's features, L2-normalised, row i of both is pair i; b may differ between ranks.
        Any float dtype; sums are kept in float32, or float64 for float64 inputs.
    logit_scale: 1 / temperature, a number or a tensor with one element.
    teacher_image, teacher_text: (b, d_t) frozen features, L2-normalised; needed where alpha > 0.
    alpha: the teacher's share of the similarity, in [0, 1].
    sharpness: kappa; 0 gives InfoNCE (with teacher_sharpness 0 or None). 1 is the paper to the letter.
    teacher_sharpness: kappa_t; None means sharpness.
    pair_ids: (b,) or (b, k) int64; two pairs equal in any column are not negatives of each other.
    negative_mass: mean weight of the negatives; 1 is the paper's condition 2, other values are for controls.
    drop_below: negatives whose mean-1 weight is less are removed and the others count 1 (paper section 4.3).
    group: process group; None is the default one where it is initialised, else one process.
    backend: "reference" holds the matrix; "streaming" works by tiles in O(N) memory on any device; "triton" likewise
        with fused kernels, on CUDA or under TRITON_INTERPRET=1; "auto" takes triton on CUDA, else streaming.
    statistics: also return figures of the whole global batch (two more passes). With keys: those of the loss without.
    keys: compare with these instead of with the other modality's features: momentum encoders, a queue.
    soft_weight: a in (1 - a) * L_i + a * S_i, in [0, 1]; S_i, unregulated, has the momentum model's distribution over
        the same keys as its target (`sacl_ds.losses.queue`). Needs keys.
    counts: pairs of every rank, in rank order, where they are known; on all ranks or on none. Without, the ranks ask
        each other, and the host waits for its device. With them, what ranks disagree on is seen with pair_ids alone: on
        a CPU, and with statistics on any device.

    Differentiable once, in image, text and logit_scale (twice with the reference on one rank): create_graph=True raises
    RuntimeError, as does a change in place of features between forward and backward. The gradient that comes into the
    loss must be the same on all ranks, as under every engine that averages gradients. Raises ValueError for shapes or
    settings that do not fit, and on all ranks where these disagree on what they bring.
    """
    from sacl_ds.losses.streaming import GlobalBatch, TileJob, joint_loss
    from sacl_ds.losses.tiles import row_products, wide
    from sacl_ds.losses.weights import Contrast, WeightTiles, mutual_information

    with said_on_all_ranks(image.device, group, counts is None):
        regulation = Regulation(
            alpha, sharpness, sharpness if teacher_sharpness is None else teacher_sharpness, negative_mass, drop_below
        )
        teacher = _checked_teacher(image, text, teacher_image, teacher_text, pair_ids, regulation)
        if keys is not None:
            keys.check(image, teacher is not None, pair_ids)
        if not 0 <= soft_weight <= 1 or (soft_weight and keys is None):
            raise ValueError(f"soft_weight={soft_weight} must lie in [0, 1], and needs keys above 0")
        known = _checked_counts(counts, image, group)
        tiles = _tiles(backend, image)
        logit_scale = _checked_scale(logit_scale, image)
    with torch.autocast(image.device.type, enabled=False):
        if tiles is None:
            image, text = image.to(wide(image)), text.to(wide(image))
            teacher = teacher and (teacher[0].to(image), teacher[1].to(image))
        # what all ranks have to know of this one's pairs
        of_images, of_texts = teacher or (None, None)
        rows: dict[str, Tensor | None] = {"text": text, "teacher_text": of_texts}
        if keys is not None:
            rows |= {"text": text if statistics else None, "teacher_image": of_images}
            rows |= {"key_image": keys.image, "key_text": keys.text}
        elif tiles is None:
            rows |= {"image": image, "teacher_image": of_images}
        else:
            dtype = tiles.feature_dtype(image)
            rows["cosine"] = row_products(image.detach().to(dtype), text.detach().to(dtype)).to(wide(image))
        settings: dict[str, object] = {**regulation.alike, "the backend": "reference" if tiles is None else "tiles"}
        settings |= {"statistics": bool(statistics)}
        settings |= {"soft_weight": float(soft_weight), "keys": keys and keys.kind, "logit_scale": logit_scale}
        compared = settings if known is None or statistics or not image.is_cuda else None  # else nothing waits
        batch = GlobalBatch.gather((image, text), teacher, pair_ids, group, rows, known, tiles is None, compared)
        joint = None
        if keys is not None:
            from sacl_ds.losses.queue import dense_keys_loss, keys_loss

            if tiles is None:
                out = dense_keys_loss(batch, logit_scale, keys, soft_weight, regulation)
            else:
                out = keys_loss(logit_scale, keys, soft_weight, TileJob.of(batch, regulation, tiles, keys.queue_ids))
        elif tiles is None:
            out = dense_loss(batch, logit_scale, regulation)
        else:
            out, joint = joint_loss(logit_scale, TileJob.of(batch, regulation, tiles))
        if statistics:
            contrast = Contrast.of(batch) if joint is None else Contrast(joint.images, joint.texts, group)
            weights = WeightTiles(contrast, regulation)
            out = replace(out, statistics=mutual_information(weights, float(logit_scale.detach())))
    return out


class SimilarityRegulatedLoss(nn.Module):
    """`similarity_regulated_loss` as a module, which keeps the settings; it has neither parameters nor buffers.

    The constructor's arguments are those of the function and plain attributes, which a schedule may set:

        loss = SimilarityRegulatedLoss(sharpness=3.0)(image, text, logit_scale)
    """

    def __init__(
        self,
        alpha: float = 0.0,
        sharpness: float = 1.0,
        teacher_sharpness: float | None = None,
        negative_mass: float = 1.0,
        drop_below: float | None = None,
        soft_weight: float = 0.0,
        group: Group = None,
        backend: str = "auto",
    ) -> None:
        """Raise ValueError for settings out of range."""
        super().__init__()
        Regulation(
            alpha, sharpness, sharpness if teacher_sharpness is None else teacher_sharpness, negative_mass, drop_below
        )
        _check_backend(backend)
        self.alpha = alpha
        self.sharpness = sharpness
        self.teacher_sharpness = teacher_sharpness
        self.negative_mass = negative_mass
        self.drop_below = drop_below
        self.soft_weight = soft_weight
        self.group = group
        self.backend = backend

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | float,
        teacher_image: Tensor | None = None,
        teacher_text: Tensor | None = None,
        pair_ids: Tensor | None = None,
        keys: Keys | None = None,
        alpha: float | None = None,
    ) -> Tensor:
        """The 0-dim loss. alpha: the teacher's share of the similarity in this call; None is the constructor's."""
        return similarity_regulated_loss(
            image,
            text,
            logit_scale,
            teacher_image,
            teacher_text,
            self.alpha if alpha is None else alpha,
            self.sharpness,
            self.teacher_sharpness,
            pair_ids,
            self.negative_mass,
            self.drop_below,
            self.group,
            self.backend,
            keys=keys,
            soft_weight=self.soft_weight,
        ).loss

    def extra_repr(self) -> str:
        names = ("alpha", "sharpness", "teacher_sharpness", "negative_mass", "drop_below", "soft_weight", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _tiles(backend: str, features: Tensor) -> Tiles | None:
    """Return the module that computes the tiles; None for the dense form."""
    _check_backend(backend)
    if backend == "auto":
        fits = features.is_cuda and features.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
        backend = "triton" if fits else "streaming"
    if backend == "triton":
        if not features.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend='triton' needs CUDA tensors, or TRITON_INTERPRET=1; here use 'streaming'")
        if features.dtype == torch.float64:
            raise ValueError("backend='triton' has no float64; use 'streaming'")
        from sacl_ds.losses import triton

        return triton
    from sacl_ds.losses import tiles

    return None if backend == "reference" else tiles


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")


def _checked_counts(counts: Sequence[int] | None, image: Tensor, group: Group) -> list[int] | None:
    """Raise ValueError where this rank's rows are not as many as `counts` says."""
    if counts is None:
        return None
    if len(counts) != world_size(group) or counts[rank(group)] != len(image):
        raise ValueError(f"counts={list(counts)} of {world_size(group)} ranks, and this one holds {len(image)} pairs")
    return list(counts)


def _checked_scale(logit_scale: Tensor | float, image: Tensor) -> Tensor:
    """Convert the scale to a tensor. Raises ValueError for several elements, which would scale logits unevenly."""
    if not isinstance(logit_scale, Tensor):
        return torch.tensor(
            float(logit_scale), dtype=torch.promote_types(image.dtype, torch.float32), device=image.device
        )
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must be one number, got {tuple(logit_scale.shape)}")
    return logit_scale


def _checked_teacher(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    pair_ids: Tensor | None,
    regulation: Regulation,
) -> tuple[Tensor, Tensor] | None:
    """Raise ValueError for shapes that do not fit; return the teacher's features if they make a difference."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image and text must be (b, d) alike, got {tuple(image.shape)} and {tuple(text.shape)}")
    if pair_ids is not None and (pair_ids.ndim not in (1, 2) or len(pair_ids) != len(image)):
        raise ValueError(f"pair_ids must be ({len(image)},) or ({len(image)}, k), got {tuple(pair_ids.shape)}")
    if (teacher_image is None) != (teacher_text is None):
        raise ValueError("teacher_image and teacher_text come together or not at all")
    if teacher_image is None or teacher_text is None:
        if regulation.alpha > 0:
            raise ValueError(f"alpha={regulation.alpha} needs teacher_image and teacher_text")
        return None
    if teacher_image.shape != teacher_text.shape or len(teacher_image) != len(image):
        raise ValueError(
            f"teacher features must be (b={len(image)}, d_t) alike, "
            f"got {tuple(teacher_image.shape)} and {tuple(teacher_text.shape)}"
        )
    return (teacher_image.detach(), teacher_text.detach()) if regulation.teacher else None
