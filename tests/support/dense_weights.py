"""Weights of a batch and what records say of them, from whole matrices in float64, by numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sacl_ds.losses import Regulation


def dense(data: Mapping[str, Any], regulation: Regulation, scale: float, lowest: int) -> list[dict[str, Any]]:
    """Image anchors over texts, then text anchors over images.

    data: image, text (n, d), teacher_image, teacher_text (n, d_t), ids (n, k). lowest: so many pairs of least weight,
    as (weight, anchor, negative, student, teacher).
    """
    x = {name: np.asarray(value).astype(np.int64 if name == "ids" else np.float64) for name, value in data.items()}
    n, ids = len(x["image"]), x["ids"]
    negative = ~(ids[:, None] == ids[None]).any(-1) & ~np.eye(n, dtype=bool)
    cosine, theirs = x["image"] @ x["text"].T, x["teacher_image"] @ x["teacher_text"].T
    result = []
    for c, t in ((cosine, theirs), (cosine.T, theirs.T)):
        a = regulation.alpha
        s = a * np.exp(regulation.teacher_sharpness * t) + (1 - a) * np.exp(regulation.sharpness * c)
        inverse = np.where(negative, 1 / s, 0)
        count = negative.sum(1)
        some = count > 0
        w = np.zeros_like(s)
        w[some] = count[some, None] * inverse[some] / inverse[some].sum(1, keepdims=True)
        kept = negative
        if regulation.drop_below is not None:
            kept = negative & (w >= regulation.drop_below)
            w = kept.astype(float)
        w = w * regulation.negative_mass
        has = kept.any(1)
        e = np.exp(scale * c)
        effective = w[has].sum(1) ** 2 / (w[has] ** 2).sum(1)
        p = (e * negative)[has]
        q = (w * e)[has]
        mass = np.log(q.sum(1)) - np.log(p.sum(1))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.where(q > 0, q * np.log(q / p), 0).sum(1)
        pairs = [(w[i, j], i, j, c[i, j], t[i, j]) for i, j in np.argwhere(negative)]
        result.append(
            {
                "anchors": n,
                "pairs": int(count.sum()),
                "weights": w[negative],
                "effective": effective.mean(),
                "effective_share": (effective / count[has]).mean(),
                "mass": mass.mean(),
                "shape": divergence.mean(),
                "mean_log_weight": np.log(w[kept]).mean(),
                "lowest": sorted(pairs)[:lowest],
            }
        )
    return result
