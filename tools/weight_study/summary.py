"""Results of a study: a table over seeds, the verdict that was asked for, and its plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from weight_study.plan import Plan
from weight_study.runner import Trial

Results = Mapping[Trial, Mapping[str, Any]]
METRIC = "mAP"
_SHOWN = (METRIC, "matches_AP", "nDCG@10", "any_R@1", "text_to_image_R@1", "image_to_text_R@1")
SIMILARITY_FREE = ("infonce", "control")


@dataclass(frozen=True)
class ArmSummary:
    """Mean of an arm over its seeds; fractions."""

    name: str
    family: str
    values: dict[str, list[float]]  # of each seed, in the plan's order
    seconds: float

    @property
    def mean(self) -> float:
        return fmean(self.values[METRIC])

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (n - 1); 0 for one."""
        return stdev(self.values[METRIC]) if len(self.values[METRIC]) > 1 else 0.0


def rows(plan: Plan, results: Results) -> list[ArmSummary]:
    """Average the arms of which every seed is there, best first."""
    found = []
    for name, arm in plan.arms.items():
        per_seed = [results[name, seed] for seed in plan.seeds if (name, seed) in results]
        if len(per_seed) == len(plan.seeds):
            values = {key: [float(each[key]) for each in per_seed] for key in _SHOWN}
            for key in ("effective_share", "mass", "shape", "under_0.7"):
                values[key] = [float(each["weights_at_end"].get(key, float("nan"))) for each in per_seed]
            values["logit_scale"] = [float(each["logit_scale"]) for each in per_seed]
            found.append(ArmSummary(name, arm.family, values, fmean(each["seconds"] for each in per_seed)))
    return sorted(found, key=lambda row: -row.mean)


def table(found: list[ArmSummary]) -> str:
    """Format Markdown, per cent: mean and spread over seeds of the metric, means of the other metrics."""
    columns = (
        "arm", METRIC, "spread", "AP of matches", "nDCG@10", "R@1, any", "R@1 t→i / i→t", "negatives under 0.7",
        "effective", "push", "shape",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found:
        mean = {key: fmean(values) for key, values in row.values.items()}
        weights = (
            f"{100 * mean['under_0.7']:.0f} | {100 * mean['effective_share']:.0f} | {mean['mass']:+.1f} | "
            f"{mean['shape']:.1f}"
            if mean["mass"] == mean["mass"]
            else "| | | "
        )
        per_cent = {key: f"{100 * mean[key]:.1f}" for key in _SHOWN}
        lines.append(
            f"| {row.name} | {per_cent[METRIC]} | {100 * row.spread:.1f} | {per_cent['matches_AP']} | "
            f"{per_cent['nDCG@10']} | {per_cent['any_R@1']} | {per_cent['text_to_image_R@1']} / "
            f"{per_cent['image_to_text_R@1']} | {weights} |"
        )
    return "\n".join(lines)


def verdict(found: list[ArmSummary]) -> list[str]:
    """Compare the best regulated arm with the best without similarity, and both with InfoNCE and the oracle."""

    def best(*families: str) -> ArmSummary | None:
        return next((row for row in found if row.family in families), None)

    plain, free, ours, oracle = best("infonce"), best(*SIMILARITY_FREE), best("regulated"), best("oracle")
    if free is None or ours is None:
        return ["not enough arms are finished for a verdict"]
    lines = [_against(ours, free)]
    if plain is not None and oracle is not None and oracle.mean > plain.mean:
        lines.append(
            f"From {plain.name} ({100 * plain.mean:.1f}) to the oracle {oracle.name} ({100 * oracle.mean:.1f}), "
            f"{ours.name} goes {100 * (ours.mean - plain.mean) / (oracle.mean - plain.mean):.0f} % of the way, "
            f"{free.name} {100 * (free.mean - plain.mean) / (oracle.mean - plain.mean):.0f} %."
        )
    return lines


def _against(ours: ArmSummary, free: ArmSummary) -> str:
    paired = [a - b for a, b in zip(ours.values[METRIC], free.values[METRIC], strict=True)]
    gain, spread = fmean(paired), max(ours.spread, free.spread)
    seeds = ", ".join(f"{100 * difference:+.1f}" for difference in paired)
    line = (
        f"{ours.name} ({100 * ours.mean:.1f}) against the best arm without similarity, {free.name} "
        f"({100 * free.mean:.1f}): {100 * gain:+.1f} points of mAP ({seeds} seed by seed)"
    )
    if spread == 0:
        return f"{line}; one seed says nothing about the spread."
    more = "more" if gain > 2 * spread else "NOT more"
    line = f"{line}, {gain / spread:.1f} spreads (the larger spread of the two is {100 * spread:.1f}): {more} than two."
    # seeds change data and starting weights for all arms alike, so the differences vary less than the arms
    own = stdev(paired)
    counted = f", {gain / own:.1f} spreads of their own" if own > 0.0005 else ""
    return f"{line} The differences themselves vary by {100 * own:.1f}{counted}."


def save_csv(plan: Plan, results: Results, path: Path) -> None:
    """Write a line a trial."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "family", "seed", *_SHOWN, "logit_scale", "seconds", "fingerprint"])
        for (name, seed), result in sorted(results.items()):
            figures = [f"{result[key]:.4f}" for key in (*_SHOWN, "logit_scale")]
            writer.writerow(
                [name, plan.arms[name].family, seed, *figures, round(result["seconds"]), plan.fingerprint(name, seed)]
            )
