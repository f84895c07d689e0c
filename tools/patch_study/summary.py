"""Results of the study of patch selection, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from patch_study.plan import PatchPlan
from patch_study.tasks import QuestionAnswering
from patch_study.trial import Trial
from sacl_ds.analysis.patches import draw, look

Results = Mapping[Trial, Mapping[str, Any]]

_COLUMNS = {
    "vqa": ("accuracy", "kept_asked", "kept_objects"),
    "pretrain": ("any_R@1", "reranked_any_R@1", "mAP", "mlm", "own_R@1", "told_R@1"),
}
_LOSSES = ("itc_training", "itc_held_out")  # in nats, not per cent


def write_table(plan: PatchPlan, results: Results, out: Path) -> str:
    """Write table.md into `out`: arms of which all seeds are there, per cent, mean ± standard deviation over seeds."""
    text = "\n\n".join(part for part in (_table(plan, results, task) for task in _COLUMNS) if part)
    if not text:
        return "no arm has all its seeds yet"
    (out / "table.md").write_text(text + "\n")
    return text


def _table(plan: PatchPlan, results: Results, task: str) -> str:
    names = [
        name
        for name, arm in plan.arms.items()
        if arm.task == task and all((name, seed) in results for seed in plan.seeds)
    ]
    if not names:
        return ""
    columns = [*_COLUMNS[task], *(_LOSSES if task == "pretrain" else ())]
    kinds = sorted(results[names[0], plan.seeds[0]].get("by_kind", {}))
    lines = [f"| arm | {' | '.join([*columns, *kinds])} |", "|---" * (1 + len(columns) + len(kinds)) + "|"]
    for name in names:
        cells = []
        for column in columns:
            values = [results[name, seed][column] for seed in plan.seeds if column in results[name, seed]]
            factor, digits = (1, 2) if column in _LOSSES else (100, 1)
            spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{factor * fmean(values):.{digits}f}{spread}" if values else "")
        for kind in kinds:
            cells.append(f"{100 * fmean(results[name, seed]['by_kind'][kind] for seed in plan.seeds):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_kept(task: QuestionAnswering, title: str, path: Path, count: int = 3) -> None:
    """Write a PNG: what the task's model keeps of the first `count` held-out scenes that have questions about two
    objects, for one question about each."""
    looked = []
    for scene in range(len(task.scenes)):
        rows = [row for row, index in enumerate(task.held_out.scene.tolist()) if index == scene]
        others = [row for row in rows if task.held_out.places[row] != task.held_out.places[rows[0]]]
        if not others:
            continue
        questions = [question for _, question, _ in task.questions(task.scenes, scene)]
        said = [questions[row - rows[0]] for row in (rows[0], others[0])]
        looked.append(look(task.model, task.tokenizer, task.held_out_images[scene].expand(2, -1, -1, -1), said))
        if len(looked) == count:
            break
    draw(looked, task.model.image_encoder.vit.patch_embed.patch_size[0], title, path)


def speed_table(plan: PatchPlan, seconds: dict[str, float]) -> str:
    """Format step times relative to the first arm of the same task."""
    lines = ["| arm | ms a step | pairs/s | against none |", "|---|---|---|---|"]
    for name, took in seconds.items():
        task = plan.arms[name].task
        whole = next(seconds[other] for other in seconds if plan.arms[other].task == task)
        lines.append(f"| {name} | {1000 * took:.0f} | {plan.sizes.batch / took:.0f} | {whole / took:.2f} |")
    return "\n".join(lines)
