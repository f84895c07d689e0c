"""The examined model (a run or a checkpoint) with its teacher, and pairs as these see them."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from sacl_ds.analysis.pairs import Pairs, is_features
from sacl_ds.config import CaptionFilter, RunConfig
from sacl_ds.config_file import load_config
from sacl_ds.data.batch import Batch, TrainingView
from sacl_ds.data.collate import Collator, Item
from sacl_ds.data.grouping import Grouping
from sacl_ds.data.order import Place
from sacl_ds.data.sample import BadSample, Sample, SampleFault, Source
from sacl_ds.data.scenes import SceneSource
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.reading import RawSample
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.data.sources import held_out_scenes
from sacl_ds.data.text import Tokenizer
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.evaluation.rounds import require_finite
from sacl_ds.losses import Regulation
from sacl_ds.model.placing import fill
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, load_model
from sacl_ds.model.teacher import Teacher, load_teacher, teacher_features
from sacl_ds.training.schedules import alpha as alpha_at

__all__ = [
    "Pairs", "Subject", "data_source", "folder_of", "is_features", "load_subject", "load_trained", "pictures",
    "read_pairs", "regulation_of",
]  # fmt: skip

WITHOUT = "none"  # in the place of a teacher
_OWN_TEACHER = "teacher"  # the teacher phase's directory inside a run's
_THREADS = 4
_AHEAD = 64
# of a run's data: it is not for the directory of a run, which may be anybody's, to say where files are written
_NOT_TAKEN_OVER: dict[str, Any] = {"weights": None, "cache_dir": None}


@dataclass(frozen=True)
class Subject:
    """A trained model in eval mode, its parameters without gradient, on `device`."""

    name: str  # as it was given
    folder: Path  # the run directory
    run: RunConfig
    step: int  # steps done
    model: SaclModel
    tokenizer: Tokenizer
    teacher: Teacher | None
    device: torch.device


def load_subject(path: str | Path, teacher: str | None = None, device: torch.device | str = "cpu") -> Subject:
    """Load a finished run's directory, or RUN/checkpoints/step_N of any ZeRO stage, with its teacher.

    teacher: None: the run's own (teacher.checkpoint, or RUN/teacher), if it has one; 'none': without; else as
    teacher.checkpoint. Raises UserError.
    """
    path, device = Path(path), torch.device(device)
    folder = folder_of(path)
    model, run, tokenizer, step = load_trained(path)
    model = model.to(device)
    return Subject(str(path), folder, run, step, model, tokenizer, _teacher(run, folder, teacher, device), device)


def folder_of(path: Path) -> Path:
    """Return the run directory of RUN or RUN/checkpoints/step_N."""
    inside = path.parent.name == "checkpoints" and not (path / WEIGHTS).exists()
    return path.parent.parent if inside else path


def load_trained(path: Path, setting: str = "run") -> tuple[SaclModel, RunConfig, Tokenizer, int]:
    """Load a trained model from RUN or RUN/checkpoints/step_N.

    Returns the model (eval mode, CPU, no gradients), its configuration, its tokenizer and its number of steps. setting:
    the name that error lines use. Raises UserError.
    """
    if folder_of(path) != path:
        model, run, tokenizer, step = _of_checkpoint(path)
    else:
        if not (path / WEIGHTS).exists() and (path / "checkpoints").is_dir():
            raise UserError(
                f"{path} is not finished (no {WEIGHTS}); give one of its checkpoints, {path}/checkpoints/step_N"
            )
        model, run, tokenizer = load_model(path, setting)
        step = _saved_step(path / WEIGHTS)
    return model.requires_grad_(False).eval(), run, tokenizer, step


def data_source(run: RunConfig, shards: str | Sequence[str] | None) -> Source:
    """Open the given shards, with the run's choice of captions; None: the run's held-out data. Raises UserError."""
    if shards is not None:
        return ShardSource(index_shards(shards, "--shards", typed=True), run.data.model_copy(update=_NOT_TAKEN_OVER))
    if run.data.source == "scenes":
        return SceneSource(held_out_scenes(run))
    if run.data.eval_shards is None:
        raise UserError(
            "the run has no held-out data (data.eval_shards); name shards by --shards '/path/{000..010}.tar'"
        )
    every = run.data.model_copy(update={"captions": CaptionFilter(), **_NOT_TAKEN_OVER})
    return ShardSource(index_shards(run.data.eval_shards, "data.eval_shards"), every)


def regulation_of(
    run: RunConfig,
    alpha: float | None = None,
    sharpness: float | None = None,
    teacher_sharpness: float | None = None,
) -> Regulation:
    """Return the regulation at the end of that run, overridden by the values given.

    A run of InfoNCE had sharpness 0, and one without teacher alpha 0. teacher_sharpness follows sharpness where neither
    it nor the run sets it.
    """
    loss = run.loss
    of_run = 0.0 if loss.contrastive == "infonce" else loss.sharpness
    kappa = of_run if sharpness is None else sharpness
    of_teacher = loss.teacher_sharpness if teacher_sharpness is None else teacher_sharpness
    share = (alpha_at(run.train.steps - 1, run) if run.uses_teacher else 0.0) if alpha is None else alpha
    try:
        return Regulation(
            share, kappa, kappa if of_teacher is None else of_teacher, loss.negative_mass, loss.drop_below
        )
    except ValueError as error:
        raise UserError(f"{error} (--alpha, --sharpness, --teacher-sharpness)") from None


@torch.no_grad()
def read_pairs(
    subject: Subject,
    source: Source,
    count: int | None,
    *,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda read: None,
) -> Pairs:
    """Features of the first `count` samples (None: of all) in their stored order, under model and teacher.

    Of each the first wanted caption, image in the canonical view. Samples that cannot be used are left out and counted
    in `skipped`; progress(n) is called as samples are read. Raises UserError where there is none to be used.
    """
    teacher = subject.teacher
    view = TrainingView(CanonicalView(subject.run.model.image_size), subject.tokenizer)
    data = subject.run.data
    grouping = Grouping.load(Path(data.grouping)) if data.grouping else None
    collator = Collator(view, 0, None, teacher.view if teacher else None, duplicates=data.duplicates, grouping=grouping)
    names: list[tuple[str, str, str, str, str]] = []
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "text", "t_image", "t_text", "ids")}
    skipped = 0

    def encode(part: list[Item]) -> None:
        batch: Batch = collator(part).to(subject.device)
        made = {
            "image": subject.model.encode_image(batch.images)[1],
            "text": subject.model.encode_text(batch.input_ids, batch.attention_mask)[1],
            "ids": batch.pair_ids,
        }
        if teacher is not None:
            made["t_image"], made["t_text"] = teacher_features(teacher, batch)
        for name, tensor in made.items():
            arrays[name].append((tensor if name == "ids" else tensor.float()).cpu().numpy())

    waiting: list[Item] = []
    for seen in _seen(source, collator, count):
        progress(1)
        if seen is None:
            skipped += 1
            continue
        item, name = seen
        waiting.append(item)
        names.append(name)
        if len(waiting) == batch_size:
            encode(waiting)
            waiting = []
    if waiting:
        encode(waiting)
    if not names:
        raise UserError(f"none of {skipped} samples can be used; look at them with tools/inspect_shards.py")
    joined = {name: np.concatenate(parts) if parts else None for name, parts in arrays.items()}
    keys, shards, captions, hashes, urls = (list(column) for column in zip(*names, strict=True))
    image, text, ids = joined["image"], joined["text"], joined["ids"]
    assert image is not None and text is not None and ids is not None  # noqa: PT018
    for part, said in (("image", "image"), ("text", "text"), ("t_image", "teacher"), ("t_text", "teacher")):
        if (array := joined[part]) is not None:
            require_finite(array, keys, f"{said} features")
    scale = float(subject.model.logit_scale().float())
    return Pairs(
        keys, shards, captions, image, text, joined["t_image"], joined["t_text"], ids, scale, hashes, urls, skipped
    )


def pictures(source: Source, wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Image.Image]:
    """Read {(shard, key): picture, RGB} in one pass over those shards; what is not found is left out."""
    left, shards = set(wanted), {shard for shard, _ in wanted}
    found: dict[tuple[str, str], Image.Image] = {}
    for raw, _ in _raw_samples(source, None, shards):
        if not left:
            break
        if isinstance(raw, RawSample) and (raw.shard, _key(raw)) not in left:
            continue
        try:
            sample = source.decode(raw)
            place = (sample.shard, sample.key)
            if place in left:
                found[place] = Image.fromarray(sample.picture.pixels().permute(1, 2, 0).contiguous().numpy())
                left.discard(place)
        except ValueError:  # BadSample, BadImage
            continue
    return found


def source_count(source: Source) -> int:
    """Return the number of samples in all shards."""
    return sum(map(sum, source.sets))


def _of_checkpoint(path: Path) -> tuple[SaclModel, RunConfig, Tokenizer, int]:
    # DeepSpeed takes seconds to import, and finished runs do not need it
    from sacl_ds.training.checkpoint_folder import read_checkpoint

    folder = path.parent.parent
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).exists():
            raise UserError(f"{path}: no {name} in {folder}; give RUN/checkpoints/step_N of a run")
    weights, state = read_checkpoint(path)
    run = load_config(folder / CONFIG, [])
    tokenizer = Tokenizer.load(folder / TOKENIZER, run.model.max_tokens)
    model = SaclModel(run.model, tokenizer.size, pretrained=False)
    fill(model, weights, str(path), f" does not fit {folder / CONFIG}")
    return model, run, tokenizer, state.step


def _saved_step(weights: Path) -> int:
    """Read the step noted in a weights file; 0 where there is none."""
    with safe_open(weights, "pt") as file:
        said = (file.metadata() or {}).get("sacl_ds", "{}")
    try:
        step = json.loads(said)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return step if type(step) is int else 0


def _teacher(run: RunConfig, folder: Path, given: str | None, device: torch.device) -> Teacher | None:
    if given == WITHOUT:
        return None
    if given is not None:
        return load_teacher(given, device, "--teacher")
    if not run.uses_teacher:
        return None
    own = run.teacher.checkpoint
    if own is None:
        own = str(folder / _OWN_TEACHER)
        if not (folder / _OWN_TEACHER / WEIGHTS).exists():
            raise UserError(f"{folder}: its teacher is not in {own}; name one by --teacher, or --teacher {WITHOUT}")
    return load_teacher(own, device)


def _seen(
    source: Source, collator: Collator, count: int | None
) -> Iterator[tuple[Item, tuple[str, str, str, str, str]] | None]:
    """(item, names) of each sample in its order, decoded by several threads; None for one that cannot be used."""

    def one(raw: Any, place: Place) -> tuple[Item, tuple[str, str, str, str, str]] | None:
        if isinstance(raw, SampleFault):
            return None
        try:
            sample = source.decode(raw)
            item = collator.item(replace(sample, wanted=sample.wanted[:1]), place)
        except BadSample:
            return None
        return item, (sample.key, sample.shard, item.caption, *_provenance(raw, sample))

    waiting: deque[Future[tuple[Item, tuple[str, str, str, str, str]] | None]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for raw, place in _raw_samples(source, count):
            waiting.append(pool.submit(one, raw, place))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _raw_samples(source: Source, count: int | None, shards: set[str] | None = None) -> Iterator[tuple[Any, Place]]:
    """Undecoded samples or faults of the first `count`, shard after shard; shards: only those of these names."""
    left = source_count(source) if count is None else count
    names = getattr(source, "shards", None)
    for shard, size in enumerate(size for sizes in source.sets for size in sizes):
        if shards is not None and names is not None and names[shard] not in shards:
            continue
        samples = source.head(shard, min(size, left))
        try:
            for offset in range(min(size, left)):
                yield next(samples), Place(0, shard, offset)
        finally:
            samples.close()
        left -= min(size, left)


def _key(raw: RawSample) -> str:
    return str(raw.fields["__key__"]).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _provenance(raw: Any, sample: Sample) -> tuple[str, str]:
    """(sha256, url) from img2dataset's metadata; the hash of the stored image where there is none."""
    meta: Any = {}
    if isinstance(raw, RawSample) and "json" in raw.fields:
        try:
            meta = json.loads(raw.fields["json"])
        except (ValueError, RecursionError):
            meta = {}
    meta = meta if isinstance(meta, dict) else {}
    digest, url = meta.get("sha256"), meta.get("url")
    if not (isinstance(digest, str) and digest):
        digest = hashlib.sha256(sample.image_bytes).hexdigest() if sample.shard else ""  # scenes have no file
    return digest, url if isinstance(url, str) else ""
