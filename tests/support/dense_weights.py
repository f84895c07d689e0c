"""Weights of a batch and what records say of them, from whole matrices in float64, by numpy alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sacl_ds.losses import Regulation


def matrices(
    data: Mapping[str, Any], regulation: Regulation
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(n, n) weights, negatives, cosines, the teacher's: image anchors over texts, then text anchors over images.

    data: image, text (n, d), teacher_image, teacher_text (n, d_t), ids (n, k).
    """
    x = {name: np.asarray(value).astype(np.int64 if name == "ids" else np.float64) for name, value in data.items()}
    n, ids = len(x["image"]), x["ids"]
    negative = ~(ids[:, None] == ids[None]).any(-1) & ~np.eye(n, dtype=bool)
    cosine, theirs = x["image"] @ x["text"].T, x["teacher_image"] @ x["teacher_text"].T
    for c, t in ((cosine, theirs), (cosine.T, theirs.T)):
        a = regulation.alpha
        s = a * np.exp(regulation.teacher_sharpness * t) + (1 - a) * np.exp(regulation.sharpness * c)
        inverse = np.where(negative, 1 / s, 0)
        count = negative.sum(1)
        some = count > 0
        w = np.zeros_like(s)
        w[some] = count[some, None] * inverse[some] / inverse[some].sum(1, keepdims=True)
        if regulation.drop_below is not None:
            w = (negative & (w >= regulation.drop_below)).astype(float)
        yield w * regulation.negative_mass, negative, c, t


def information(data: Mapping[str, Any], regulation: Regulation, scale: float) -> dict[str, float]:
    """Figures on mutual information as docs/method.md defines them, over both directions."""
    found: dict[str, list[float]] = {name: [] for name in ("positive", "negative", "target", "bound", "mass", "count")}
    for w, negative, c, _ in matrices(data, regulation):
        for i in range(len(c)):
            z, own, weighs = scale * c[i], scale * c[i, i], w[i] > 0
            n, pushed = negative[i].sum(), (w[i] * np.exp(z)).sum()
            mean = (np.exp(own) + pushed) / (1 + n)
            found["positive"].append(own - np.log(mean))
            found["negative"] += list(z[weighs] + np.log(w[i, weighs]) - np.log(mean))
            found["target"] += list(-np.log(w[i, weighs]))
            every = np.exp(z[negative[i]]).sum()
            found["bound"].append(np.log(1 + n) + np.log(np.exp(own) / (np.exp(own) + every)))
            found["count"].append(n)
            if weighs.any():
                found["mass"].append(np.log(pushed / every))
    mean_of = {name: float(np.mean(values)) if values else 0.0 for name, values in found.items()}
    return {
        "pmi_positive": mean_of["positive"],
        "pmi_negative": mean_of["negative"],
        "pmi_negative_target": mean_of["target"],
        "infonce_bound": mean_of["bound"],
        "negative_mass_log": mean_of["mass"],
        "negatives": mean_of["count"],
    }


def dense(data: Mapping[str, Any], regulation: Regulation, scale: float, lowest: int) -> list[dict[str, Any]]:
    """Image anchors over texts, then text anchors over images.

    data: as in `matrices`. lowest: so many pairs of least weight, as (weight, anchor, negative, student, teacher).
    """
    result = []
    for w, negative, c, t in matrices(data, regulation):
        n, count = len(w), negative.sum(1)
        kept = w > 0
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
