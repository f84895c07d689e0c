"""Similarity-regulated contrastive learning (Jiang et al., ACL 2023, Eq. 4-9).

For image anchor i, with c_ij = <image_i, text_j>, z_ij = logit_scale * c_ij and Neg(i) the other pairs of the global
batch that share no id with i:

    s_ij = alpha * exp(kappa_t * teacher c_ij) + (1 - alpha) * exp(kappa * c_ij)
    w_ij = |Neg(i)| * (1 / s_ij) / sum_{k in Neg(i)} 1 / s_ik          (constant for the gradient; mean 1)
    L_i  = log(e^{z_ii} + sum_{j in Neg(i)} w_ij e^{z_ij}) - z_ii

and likewise over columns for text anchors. Weights that are all 1 give InfoNCE. `reference.py` computes it as it
reads; `streaming.py` without ever holding the matrix, by tiles in plain PyTorch or in Triton kernels.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sacl_ds.distributed import Group, rank, world_size
from sacl_ds.losses.keys import Keys, keys_loss
from sacl_ds.losses.reference import dense_keys_loss, dense_loss
from sacl_ds.losses.regulation import Regulation
from sacl_ds.losses.streaming import Tiles, joint_loss
from sacl_ds.losses.tiles import TorchTiles
from sacl_ds.losses.weights import Contrast, WeightTiles, mutual_information

BACKENDS = ("auto", "reference", "streaming", "triton")


@dataclass(frozen=True)
class ContrastiveOutput:
    """What `similarity_regulated_loss` returns.

    loss: 0-dim, (world / global pairs) * sum over this rank's anchors of the mean of both directions, so that the
        mean over ranks of its gradients is the gradient of one process that holds the whole batch.
    image_to_text, text_to_image: (b,) per-anchor losses, detached.
    statistics: None unless asked for; see `sacl_ds.losses.weights.mutual_information`.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    statistics: dict[str, Tensor] | None = None


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
    keys: Keys | None = None,
    soft_weight: float = 0.0,
    counts: Sequence[int] | None = None,
) -> ContrastiveOutput:
    """Image-text contrastive loss whose negatives are weighted by inverse similarity (module docstring).

    image, text: (b, d) this rank's features, L2-normalised, row i of both is pair i; b may differ between ranks.
        Any float dtype; sums are kept in float32, or float64 for float64 inputs.
    logit_scale: 0-dim tensor, 1 / temperature.
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
    statistics: also return figures of the whole global batch; takes another pass. With keys: those of the loss without.
    keys: compare with these instead of with the other modality's features: momentum encoders, a queue.
    soft_weight: a in (1 - a) * L_i + a * S_i, in [0, 1]; S_i, unregulated, has the momentum model's distribution over
        the same keys as its target (`sacl_ds.losses.distillation`). Needs keys.
    counts: pairs of every rank, in rank order, where they are known: else the ranks ask each other, and the host waits
        for its device.

    Differentiable once, in image, text and logit_scale; the gradient that comes into the loss must be the same on all
    ranks, as under every engine that averages gradients. Raises ValueError for shapes or settings that do not fit.
    """
    regulation = Regulation(
        alpha, sharpness, sharpness if teacher_sharpness is None else teacher_sharpness, negative_mass, drop_below
    )
    teacher = _checked(image, text, teacher_image, teacher_text, pair_ids, regulation)
    if keys is not None:
        keys.check(image, teacher is not None, pair_ids)
    if not 0 <= soft_weight <= 1 or (soft_weight and keys is None):
        raise ValueError(f"soft_weight={soft_weight} must lie in [0, 1], and needs keys above 0")
    known = _counted(counts, image, group)
    make_tiles = _tiles(backend, image)
    def figures(contrast: Contrast | None = None) -> dict[str, Tensor] | None:
        if not statistics:
            return None
        contrast = contrast or Contrast.of_batch(image, text, teacher, pair_ids, group)
        return mutual_information(WeightTiles(contrast, regulation), float(logit_scale.detach()))

    with torch.autocast(image.device.type, enabled=False):
        arguments = (image, text, logit_scale, teacher, pair_ids, regulation)
        if keys is not None:
            common = (*arguments[:-1], keys, regulation)
            if make_tiles is None:
                return ContrastiveOutput(*dense_keys_loss(*common, group, soft_weight), figures())
            return ContrastiveOutput(*keys_loss(*common, make_tiles, group, soft_weight, known), figures())
        if make_tiles is None:
            return ContrastiveOutput(*dense_loss(*arguments, group), figures())
        loss, joint = joint_loss(*arguments, make_tiles(regulation), group, known)
        return ContrastiveOutput(
            loss,
            joint.image_anchors.loss.to(loss.dtype),
            joint.text_anchors.loss.to(loss.dtype),
            figures(Contrast(joint.images, joint.texts, group)),
        )


def _tiles(backend: str, features: Tensor) -> Callable[[Regulation], Tiles] | None:
    """What computes the tiles; None for the dense reference."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        fits = features.is_cuda and features.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
        backend = "triton" if fits else "streaming"
    if backend == "triton":
        if not features.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend='triton' needs CUDA tensors, or TRITON_INTERPRET=1; here use 'streaming'")
        if features.dtype == torch.float64:
            raise ValueError("backend='triton' has no float64; use 'streaming'")
        from sacl_ds.losses.kernels.tiles import TritonTiles

        return TritonTiles
    return None if backend == "reference" else TorchTiles


def _counted(counts: Sequence[int] | None, image: Tensor, group: Group) -> list[int] | None:
    """Raises ValueError where this rank holds other than what is said of it."""
    if counts is None:
        return None
    if len(counts) != world_size(group) or counts[rank(group)] != len(image):
        raise ValueError(f"counts={list(counts)} of {world_size(group)} ranks, and this one holds {len(image)} pairs")
    return list(counts)


def _checked(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    pair_ids: Tensor | None,
    regulation: Regulation,
) -> tuple[Tensor, Tensor] | None:
    """The teacher's features where they count, after checking that everything fits together."""
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
