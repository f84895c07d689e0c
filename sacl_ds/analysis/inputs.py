"""Resolve a command line's RUN, CHECKPOINT or FEATURES to pairs with features and the regulation that weighs them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from sacl_ds.analysis.device import device_named
from sacl_ds.analysis.pairs import Pairs, is_features
from sacl_ds.analysis.subject import (
    WITHOUT,
    Subject,
    data_source,
    load_subject,
    read_pairs,
    regulation_of,
    source_count,
)
from sacl_ds.analysis.terminal import progress, say
from sacl_ds.checksums import seal
from sacl_ds.config import RunConfig
from sacl_ds.config_file import load_config
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.model.saved import CONFIG


@dataclass(frozen=True)
class Examined:
    """Pairs under a model, and the run that the model comes from."""

    path: str
    pairs: Pairs
    run: RunConfig
    step: int | None  # None where features do not say


def examine(path: str, options: argparse.Namespace) -> Examined:
    """Load features, or compute them; options: as `commands.data_options` declares them. Raises UserError."""
    if is_features(path):
        return _of_features(path, options)
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such directory; give a finished run, RUN/checkpoints/step_N, or saved features")
    device = device_named(options.device)
    subject = load_subject(path, options.teacher, device)
    source = data_source(subject.run, options.shards)
    total = source_count(source)
    count = min(total, options.count)
    if count < total:
        say(f"note: the first {count} of {total} pairs are read; --count reads more")
    with progress("features", count, "pairs") as done:
        pairs = read_pairs(subject, source, count, batch_size=batch_of(subject), progress=done)
    return kept(Examined(path, pairs, subject.run, subject.step), options)


def kept(examined: Examined, options: argparse.Namespace) -> Examined:
    """Save the features where asked for, and say how many samples were left out."""
    pairs = examined.pairs
    if pairs.skipped:
        say(f"note: {pairs.skipped} samples cannot be used; tools/inspect_shards.py names them")
    if options.save_features:
        folder = Path(options.save_features)
        pairs.save(folder)
        examined.run.save(folder / CONFIG)
        seal(folder, (CONFIG,))
        say(f"features of {len(pairs)} pairs in {folder}, to be given in the place of the run")
    return examined


def regulation_for(examined: Examined, options: argparse.Namespace) -> Regulation:
    """Return the run's regulation at its last step, overridden by the command line's options. Raises UserError."""
    alpha, run = options.alpha, examined.run
    if alpha is None and options.teacher not in (None, WITHOUT) and not run.uses_teacher:
        alpha = 1.0  # a teacher was asked for, and the run had none to say its share
    regulation = regulation_of(run, alpha, options.sharpness, options.teacher_sharpness)
    if examined.pairs.teacher is None and regulation.alpha > 0:
        if options.alpha is not None:
            raise UserError(
                f"--alpha {options.alpha} needs a teacher, and {examined.path} has none; name one by --teacher"
            )
        regulation = replace(regulation, alpha=0.0)
    if regulation.even:
        say(f"note: all negatives of {examined.path} weigh alike at its settings; --sharpness and --alpha change that")
    return regulation


def described(regulation: Regulation) -> dict[str, float | None]:
    """Return a regulation's parameters as values for JSON."""
    return {
        "alpha": regulation.alpha,
        "sharpness": regulation.sharpness,
        "teacher_sharpness": regulation.teacher_sharpness,
        "negative_mass": regulation.negative_mass,
        "drop_below": regulation.drop_below,
    }


def batch_of(subject: Subject) -> int:
    """Return how many images pass through the model at a time."""
    return 256 if subject.run.model.image_size <= 128 else 64


def _of_features(path: str, options: argparse.Namespace) -> Examined:
    pairs = Pairs.load(path)
    if options.shards is not None or options.save_features:
        name = "--shards" if options.shards is not None else "--save-features"
        raise UserError(f"{name}: {path} already holds features; give the run in its place to compute others")
    if options.teacher == WITHOUT:
        pairs = replace(pairs, teacher_image=None, teacher_text=None)
    elif options.teacher is not None:
        raise UserError(f"--teacher: {path} holds features; give the run in its place for another teacher")
    config = Path(path) / CONFIG
    run = load_config(config if config.exists() else None, [])
    return Examined(path, pairs, run, None)
