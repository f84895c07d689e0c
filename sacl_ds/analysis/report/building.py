"""Build a run's report: read its records, weigh pairs under its model, write the page and its plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sacl_ds.analysis.inputs import device_named, labels, progress, say
from sacl_ds.analysis.report import sections
from sacl_ds.analysis.report.examples import FindPictures, Pictures, Place, gallery, lowest_of, matrix, side_by_side
from sacl_ds.analysis.report.page import Headline, Section, percent, plain, render, shown
from sacl_ds.analysis.report.sections import SceneTruth, recorded, truth_of
from sacl_ds.analysis.subject import (
    Pairs,
    Subject,
    data_source,
    folder_of,
    load_subject,
    pictures,
    read_pairs,
    regulation_of,
    source_count,
)
from sacl_ds.config import RunConfig
from sacl_ds.config_file import load_config
from sacl_ds.data.sample import Source
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.patterns import is_plain, is_remote
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.errors import UserError
from sacl_ds.model.saved import CONFIG, WEIGHTS
from sacl_ds.training.checkpoint_folder import step_of

_LARGEST_BATCH = 1024  # of the mini-batch that is held as a matrix
_LIGHTEST = 64  # pairs per direction, where they are not from the run's records
_LIGHT = 0.7  # the paper's threshold for a light negative


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs under the run's model, and where their pictures are."""

    pairs: Pairs
    source: Source
    find: FindPictures


def act(options: argparse.Namespace) -> None:
    """Run the subcommand `report`. Raises UserError."""
    if options.pairs < 2:
        raise UserError(f"--pairs {options.pairs}: at least two, of which one is a negative of the other")
    path = write_report(
        Path(options.run),
        Path(options.out) if options.out else None,
        against=options.against,
        shards=options.shards,
        pairs=options.pairs,
        teacher=options.teacher,
        device=options.device,
    )
    say(f"report in {path}, its pictures and report.json beside it")


def write_report(
    looked_at: Path,
    out: Path | None = None,
    *,
    against: str | None = None,
    shards: Sequence[str] | None = None,
    pairs: int = 1000,
    teacher: str | None = None,
    device: str | None = None,
) -> Path:
    """Write out/report.html, report.json and pictures/; returns the path of the page.

    looked_at: RUN, or RUN/checkpoints/step_N: its model, and the records up to that step.
    Raises UserError where the run kept no records, or `against`, `shards` or `teacher` cannot be read. Parts for which
    the run lacks something (held-out data, finished weights) are left out, with a line that says why.
    """
    if against is not None and Path(against).resolve() == looked_at.resolve():
        raise UserError(f"--against {against} is the run itself; name another")
    folder, until = folder_of(looked_at), None
    if folder != looked_at:
        until = step_of(looked_at)
    out = out or folder / ("report" if until is None else f"report_{looked_at.name}")
    figures, lowest, metrics = recorded(folder, until)
    run = load_config(folder / CONFIG, [])
    drawn = out / "pictures"
    try:
        drawn.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from None

    truth = truth_of(run) if shards is None else None
    told = [line for line in [_unfinished(folder)] if line and until is None]
    subject = None if told else load_subject(looked_at, teacher, device_named(device))
    held_out = None
    if subject is not None:
        held_out, why = _held_out(subject, shards, pairs, truth)
        told += [why] if why else []
    parts = [
        sections.about(run, folder, figures, metrics),
        sections.distribution(figures, drawn),
        sections.training(figures, drawn),
        sections.information(figures, metrics, drawn),
    ]
    if held_out is not None:
        batch = held_out.pairs.take(_draw(len(held_out.pairs), min(run.train.global_batch_size, _LARGEST_BATCH)))
        parts.append(matrix(batch, regulation_of(run), held_out.find, truth, drawn, "of held-out pairs"))
    parts.append(_gallery(run, lowest, held_out, truth, drawn))
    if against is not None and subject is not None and held_out is not None:
        parts.append(_retrieval(subject, held_out, against, truth, drawn))
    parts.append(sections.duplicates(figures, metrics, run.train.global_batch_size))
    every = [part for part in parts if part is not None]
    every[0].text += told

    title = f"Weights of {folder.name or folder.resolve().name}" + ("" if until is None else f" at step {until}")
    subtitle = f"{_subtitle(run)} · {looked_at}"
    page = render(title, subtitle, _headlines(every), every)
    numbers = {"run": str(looked_at), "against": against, **{part.name: part.numbers for part in every}}
    _write(out / "report.json", json.dumps(plain(numbers), indent=1, ensure_ascii=False) + "\n")
    _write(out / "report.html", page)
    return out / "report.html"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _held_out(
    subject: Subject, shards: Sequence[str] | None, count: int, truth: SceneTruth | None
) -> tuple[HeldOut | None, str]:
    """Compute held-out pairs under the run's model, or return the reason why there are none. Raises UserError for
    shards that were asked for and cannot be read."""
    try:
        source = data_source(subject.run, shards)
        count = min(count, source_count(source))
        with progress("held-out pairs", count, "pairs") as done:
            pairs = read_pairs(subject, source, count, progress=done)
    except UserError as error:
        if shards is not None:
            raise
        return None, f"Mini-batch and retrieval are left out: {error}."
    return HeldOut(pairs, source, _finder(source, truth)), ""


def _finder(source: Source, truth: SceneTruth | None) -> FindPictures:
    def find(wanted: Sequence[Place]) -> Pictures:
        return pictures(source, wanted) if truth is None else _scenes(truth, wanted)

    return find


def _scenes(truth: SceneTruth, wanted: Sequence[Place]) -> Pictures:
    """Draw the wanted scenes from their keys, without a pass over all of them."""
    drawn = {place: truth.picture(place[1]) for place in wanted}
    return {place: picture for place, picture in drawn.items() if picture is not None}


def _gallery(
    run: RunConfig, lowest: list[dict[str, Any]], held_out: HeldOut | None, truth: SceneTruth | None, folder: Path
) -> Section:
    """Show the lowest-weight pairs of the last recorded step, or held-out pairs if the shards cannot be read."""
    step = lowest[0]["step"] if lowest else None
    origin = f"The pairs of least weight in the global batch of step {step}, by anchor."
    if run.data.source == "scenes":
        known = truth_of(run)
        assert known is not None
        return gallery(lowest, lambda wanted: _scenes(known, wanted), known, folder, origin)
    named = sorted({entry[f"{side}_shard"] for entry in lowest for side in ("anchor", "negative")})
    there = [shard for shard in named if is_plain(shard) and (is_remote(shard) or Path(shard).is_file())]
    reason = "they are not there"
    if there or not lowest:
        try:
            source = (
                ShardSource(index_shards(there), run.data.model_copy(update={"weights": None, "cache_dir": None}))
                if there
                else None
            )

            def find(wanted: Sequence[Place]) -> dict[Place, Image.Image]:
                return {} if source is None else pictures(source, [place for place in wanted if place[0] in there])

            return gallery(lowest, find, None, folder, origin)
        except UserError as error:
            reason = str(error)
    if held_out is None:
        origin += f" The training shards cannot be reached ({reason}), so that there are no pictures."
        return gallery(lowest, lambda wanted: {}, None, folder, origin)
    batch = held_out.pairs.take(_draw(len(held_out.pairs), _LARGEST_BATCH))
    origin = (
        f"The training shards cannot be reached ({reason}); these are the pairs of least weight among {len(batch)} "
        "held-out pairs, weighed as at the end of the run."
    )
    return gallery(lowest_of(batch, regulation_of(run), _LIGHTEST), held_out.find, truth, folder, origin)


def _retrieval(subject: Subject, held_out: HeldOut, against: str, truth: SceneTruth | None, folder: Path) -> Section:
    """Compare retrieval with that of the run `against` on the same held-out pairs."""
    other = load_subject(against, "none", subject.device)
    names = labels([subject.name, against])
    count = len(held_out.pairs) + held_out.pairs.skipped
    with progress(f"held-out pairs, {names[1]}", count, "pairs") as done:
        pairs = read_pairs(other, held_out.source, count, progress=done)
    if pairs.keys != held_out.pairs.keys or pairs.captions != held_out.pairs.captions:
        raise UserError(f"--against {against}: it read other held-out pairs than {subject.name}; the data have changed")
    return side_by_side([(names[0], held_out.pairs), (names[1], pairs)], held_out.find, truth, folder)


def _draw(total: int, count: int) -> np.ndarray:
    """Draw the positions of a mini-batch at random: neighbours in a shard are often alike."""
    return np.random.default_rng(0).permutation(total)[:count]


def _unfinished(folder: Path) -> str:
    if (folder / WEIGHTS).exists():
        return ""
    return f"The run is not finished (no {WEIGHTS}): parts that need its model are left out."


def _subtitle(run: RunConfig) -> str:
    if run.loss.contrastive == "infonce":
        return "InfoNCE: every negative weighs 1"
    return f"similarity-regulated, κ {shown(run.loss.sharpness)}, α {run.loss.alpha_start:g} to {run.loss.alpha_end:g}"


def _headlines(every: Sequence[Section]) -> list[Headline]:
    """List the metrics shown at the top of the report."""
    by_name = {part.name: part.numbers for part in every}
    last = by_name["weights"]["directions"]["image_to_text"]
    under = dict(zip(np.round(by_name["weights"]["thresholds"], 1).tolist(), last["under"], strict=True))
    lines = [
        Headline(percent(under[_LIGHT]), f"of the negatives weigh less than {_LIGHT} (image → text, last record)"),
        Headline(percent(last["effective_share"]), "effective number of negatives, of all of them"),
        Headline(shown(last["mass"]), "nats that the weights add to the push on the negatives"),
    ]
    if "false_negatives" in by_name["gallery"]:
        share = by_name["gallery"]["false_negatives"]
        lines.append(Headline(percent(share), "of the lightest pairs are false negatives in truth"))
    evaluation = by_name["run"]["evaluation"]
    if evaluation:
        names = [
            n for n in ("text_to_image_mAP", "text_to_image_R@1", *evaluation["values"]) if n in evaluation["values"]
        ]
        label = names[0].replace("_to_", " → ").replace("_", " ")
        lines.append(Headline(percent(float(evaluation["values"][names[0]])), f"held-out {label}"))
    return lines
