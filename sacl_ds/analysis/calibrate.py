"""calibrate: the settings that give the weights a chosen distribution, for a data set, a model and its teacher."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sacl_ds.analysis.inputs import Examined, examine, per_cent, progress, say
from sacl_ds.analysis.pairs import Pairs, negatives_of
from sacl_ds.analysis.scan import mini_batches, scan
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.losses.distribution import THRESHOLDS
from sacl_ds.losses.weights import log_weights
from sacl_ds.training.false_share import FALLING_SHARPNESS, falling_weights

LEAST, LARGEST = 0.05, 200.0  # sharpnesses that are tried
_GRID = 64
_TOLERANCE = 1e-6  # of the sharpness, relative


@dataclass(frozen=True)
class Calibrated:
    """The smallest sharpness that reaches the share, None where none does; and the curve that was searched.

    share: under the weight at `sharpness`, else at the largest one tried.
    """

    sharpness: float | None
    share: float
    grid: np.ndarray  # (g,) sharpnesses
    shares: np.ndarray  # (g,) the share under the weight at each of them


def share_under(
    cosines: Sequence[np.ndarray], negatives: Sequence[np.ndarray], sharpness: float, under: float
) -> float:
    """Share of the negatives of all anchors in both directions whose weight is under `under`.

    cosines: for each mini-batch (n, m), image i with text j; negatives: (n, m) bool alike. The weights are those of the
    loss with this one similarity.
    """
    count = total = 0
    for cosine, mask in zip(cosines, negatives, strict=True):
        c, stays = torch.from_numpy(np.asarray(cosine, np.float64)), torch.from_numpy(mask)
        for side, is_negative in ((c, stays), (c.T, stays.T)):
            low = log_weights(side, is_negative, Regulation(0.0, sharpness)) < math.log(under)
            count += int((low & is_negative).sum())
            total += int(is_negative.sum())
    if total == 0:
        raise ValueError("no pair is a negative of another")
    return count / total


def calibrated(
    cosines: Sequence[np.ndarray], negatives: Sequence[np.ndarray], share: float, under: float
) -> Calibrated:
    """The smallest sharpness at which `share` of the negatives weighs less than `under`; arguments as in `share_under`.

    log w is concave in the sharpness and 0 where that is 0, so a weight that has fallen under a bound of at most 1
    stays there: the share never falls as the sharpness grows. Raises ValueError for a share outside (0, 1) or a weight
    outside (0, 1].
    """
    if not 0 < share < 1 or not 0 < under <= 1:
        raise ValueError(f"share={share} must lie in (0, 1) and under={under} in (0, 1]")
    cosines = [np.asarray(cosine, np.float64) for cosine in cosines]
    grid = np.geomspace(LEAST, LARGEST, _GRID)
    shares = np.array([share_under(cosines, negatives, float(kappa), under) for kappa in grid])
    reached = np.flatnonzero(shares >= share)
    if not len(reached):
        return Calibrated(None, float(shares[-1]), grid, shares)
    high = float(grid[reached[0]])
    low = float(grid[reached[0] - 1]) if reached[0] else 0.0
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        if share_under(cosines, negatives, middle, under) >= share:
            high = middle
        else:
            low = middle
    return Calibrated(high, share_under(cosines, negatives, high, under), grid, shares)


def sharpness_for(cosines: np.ndarray, negatives: np.ndarray, share: float, under: float) -> float:
    """`calibrated` for one mini-batch, (n, m) both: the sharpness, NaN where none reaches the share."""
    found = calibrated([cosines], [negatives], share, under).sharpness
    return math.nan if found is None else found


_NEAR = 0.5  # of the logit scale: from here on a warning


def act(options: argparse.Namespace) -> None:
    """Run the subcommand `calibrate`."""
    for name, value in (("--share", options.share), ("--false-share", options.false_share)):
        if value is not None and not 0 < value < 1:
            raise UserError(f"{name} {value}: a share lies between 0 and 1")
    if not 0 < options.under <= 1:
        raise UserError(f"--under {options.under}: a weight above 0, and at most 1, their mean")
    if options.batches < 1 or options.batch_size < 2:
        raise UserError("--batches is at least 1, and --batch-size at least 2")
    if options.teacher_sharpness is None:
        options.teacher_sharpness = FALLING_SHARPNESS
    if options.false_share is not None and options.teacher_sharpness <= 0:
        raise UserError(f"--teacher-sharpness {options.teacher_sharpness}: above 0")
    examined = examine(options.path, options)
    pairs = examined.pairs
    size = min(options.batch_size, len(pairs))
    batches = options.batches if size < len(pairs) else 1
    drawn = list(mini_batches(len(pairs), batches, size, options.seed))
    negatives = [negatives_of(pairs.pair_ids[rows]) for rows in drawn]
    if not any(mask.any() for mask in negatives):
        raise UserError(f"{options.path}: no pair is a negative of another; give more data")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    common = {
        "path": options.path, "step": examined.step, "samples": len(pairs), "batches": len(drawn), "batch_size": size,
        "seed": options.seed, "logit_scale": pairs.logit_scale,
    }  # fmt: skip
    say(f"{options.path}: {len(drawn)} mini-batches of {size} out of {len(pairs)} pairs")
    work = _falling if options.false_share is not None else _sharpnesses
    found = common | work(examined, drawn, negatives, options, out)
    (out / "calibration.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    say(f"written: {out}/calibration.json, calibration.png")


def _sharpnesses(
    examined: Examined,
    drawn: list[np.ndarray],
    negatives: list[np.ndarray],
    options: argparse.Namespace,
    out: Path,
) -> dict[str, Any]:
    pairs = examined.pairs
    sides = {"model": (pairs.image, pairs.text)} | ({"teacher": pairs.teacher} if pairs.teacher else {})
    curves: dict[str, Calibrated] = {}
    with progress("calibrate", len(sides), "similarities") as done:
        for name, (image, text) in sides.items():
            cosines = [np.asarray(image[rows] @ text[rows].T) for rows in drawn]
            curves[name] = calibrated(cosines, negatives, options.share, options.under)
            done(1)
    settings = {"model": "loss.sharpness", "teacher": "loss.teacher_sharpness"}
    wanted = f"{per_cent(options.share)} % of the negatives under {options.under:g}"
    paste = []
    for name, found in curves.items():
        alpha = "α = 0" if name == "model" else "α = 1"
        if found.sharpness is None:
            say(
                f"{name} ({alpha}): no sharpness up to {LARGEST:g} brings {wanted}; the most is "
                f"{per_cent(found.share)} %"
            )
            continue
        paste.append(f"{settings[name]}={found.sharpness:.3g}")
        say(f"{name} ({alpha}): {wanted} from sharpness {found.sharpness:.3g} on")
    kappa = curves["model"].sharpness
    if kappa is not None and kappa > _NEAR * pairs.logit_scale:
        say(
            f"warning: sharpness {kappa:.3g} nears the logit scale {pairs.logit_scale:.1f}; past it, and with no "
            "teacher, the least similar negatives are pushed hardest"
        )
    if paste:
        say("settings: " + " ".join(paste))
    from sacl_ds.analysis.plots import share_curves

    share_curves(curves, options.share, options.under, out / "calibration.png")
    return {
        "share": options.share,
        "under": options.under,
        "settings": paste,
        **{
            name: {
                "sharpness": found.sharpness,
                "share": found.share,
                "grid": found.grid.tolist(),
                "shares": found.shares.tolist(),
            }
            for name, found in curves.items()
        },
    }


def _falling(
    examined: Examined,
    drawn: list[np.ndarray],
    negatives: list[np.ndarray],
    options: argparse.Namespace,
    out: Path,
) -> dict[str, Any]:
    pairs, kappa = examined.pairs, options.teacher_sharpness
    if pairs.teacher is None:
        raise UserError(f"--false-share: {options.path} has no teacher; name one by --teacher")
    image, text = pairs.teacher
    cosines = np.concatenate([(image[rows] @ text[rows].T)[mask] for rows, mask in zip(drawn, negatives, strict=True)])
    threshold, alpha = falling_weights(cosines, options.false_share, kappa)
    if not 0 < alpha < 1:
        raise UserError(
            f"--teacher-sharpness {kappa:g} is too much for cosines of {threshold:.2f}; choose a smaller one"
        )
    paste = [
        "loss.sharpness=0", f"loss.teacher_sharpness={kappa:g}", f"loss.alpha_start={alpha:.6g}",
        f"loss.alpha_end={alpha:.6g}",
    ]  # fmt: skip
    say(f"{per_cent(options.false_share)} % of the negatives have a teacher's cosine above {threshold:.4f}")
    under = _shares(pairs, Regulation(alpha, 0.0, kappa), drawn, options.seed)
    shown = ", ".join(f"{per_cent(under[tenth - 1])} % under .{tenth}" for tenth in (1, 2, 5, 7, 9))
    say(f"weights at these settings: {shown}")
    say("settings: " + " ".join(paste))
    from sacl_ds.analysis.plots import fall_curve

    fall_curve(cosines, threshold, kappa, options.false_share, out / "calibration.png")
    return {
        "false_share": options.false_share,
        "teacher_sharpness": kappa,
        "cosine": threshold,
        "alpha": alpha,
        "under": {f"{tenth:.1f}": float(share) for tenth, share in zip(THRESHOLDS, under, strict=True)},
        "settings": paste,
    }


def _shares(pairs: Pairs, regulation: Regulation, drawn: list[np.ndarray], seed: int) -> np.ndarray:
    """(9,) share of the weights under each of THRESHOLDS, over both directions of these mini-batches."""
    found = scan(pairs, regulation, len(drawn), len(drawn[0]), seed).values()
    total = sum(each.pairs for each in found)
    return np.sum([each.under * each.pairs for each in found], 0) / total
