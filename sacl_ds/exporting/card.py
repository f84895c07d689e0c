"""README.md of an export: what the model is, how it was trained, what it reached, how it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from sacl_ds import __version__
from sacl_ds.config import RunConfig
from sacl_ds.config_file import read_yaml
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.files import require_unchanged
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG, WEIGHTS, load_model
from sacl_ds.tasks.configuration import run_of, saved_state
from sacl_ds.telemetry.records import METRICS, read

_LOCAL_MODEL = "local-dir:"
_PLACE = re.compile(r"[/~.]|[A-Za-z]+:")  # of a path, an address or a command, which may hold a password; no hub name
_LOADED = {"start": None, "image_weights": None, "image_pretrained": False}  # the export has the weights


def travelling(settings: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Reduce folders and addresses in config.yaml to their last names. Raises UserError where the image encoder is
    described in a folder of timm's that is gone."""
    made: dict[str, Any] = {name: _named(value) for name, value in settings.items()} | {"output_dir": None}
    model = dict(settings["model"])
    encoder = str(model["image_encoder"])
    if encoder.startswith(_LOCAL_MODEL):
        model |= _architecture(Path(encoder.removeprefix(_LOCAL_MODEL)), model, label)
    keys = ("image_encoder", "image_encoder_arguments")
    made["model"] = {**_named(model), **{key: model[key] for key in keys if key in model}, **_LOADED}
    return made


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _named(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner) for inner in value]
    if isinstance(value, str) and (_PLACE.match(value) or value.startswith("@")):
        return last_name(value)
    return value


def last_name(place: str) -> str:
    """Return the last part of a path or address; only 'pipe' for a command, which may hold secrets."""
    if place.startswith("pipe:"):
        return "pipe"
    return place.partition("?")[0].rstrip("/").rpartition("/")[2] or "."


def _architecture(folder: Path, model: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Read the architecture from timm's folder, as settings that need the folder no more."""
    file = folder / "config.json"
    try:
        said = json.loads(file.read_text())
        return {
            "image_encoder": str(said["architecture"]),
            "image_encoder_arguments": {**said.get("model_args", {}), **(model.get("image_encoder_arguments") or {})},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{label}: model.image_encoder is described in {file}, which cannot be read ({type(error).__name__}); put "
            "it back"
        ) from None


_BEST = "best.json"


@dataclass(frozen=True)
class ExportSource:
    label: str  # what error lines begin with
    folder: Path  # of the run
    model: SaclModel  # on the CPU, float32, eval
    run: RunConfig  # model and, for a pre-training run, everything else
    settings: Mapping[str, Any]  # config.yaml as it stands, of any kind of run
    tokenizer: Tokenizer
    step: int | None  # of the weights, where that is told
    figures: dict[str, float]  # of the last evaluation up to that step; of the best weights where those are kept
    chance: dict[str, float]


def read_source(checkpoint: str) -> ExportSource:
    """Read a finished run, its checkpoints/step_N (of any ZeRO stage), or an earlier export. Raises UserError."""
    label, folder = f"checkpoint={checkpoint}", run_of(checkpoint)
    state, step = saved_state(checkpoint)
    model, run, tokenizer = load_model(folder, "checkpoint", state)
    whole = step is None
    if step is None:
        step = _step(folder / WEIGHTS)
    figures, chance = _evaluated(folder, step, whole)
    settings = read_yaml(folder / CONFIG)
    return ExportSource(label, folder, model.eval(), run, settings, tokenizer, step, figures, chance)


def _step(weights: Path) -> int | None:
    """Read the step that `save_weights` noted in the file, or None."""
    try:
        with safe_open(weights, "pt") as file:
            step = json.loads((file.metadata() or {}).get("sacl_ds", "{}")).get("step")
    except (OSError, ValueError, AttributeError, SafetensorError):
        return None
    return step if isinstance(step, int) else None


def _evaluated(folder: Path, step: int | None, best: bool) -> tuple[dict[str, float], dict[str, float]]:
    lines = [line for line in read(folder / METRICS) if isinstance(line.get("evaluation"), dict)]
    lines = [line for line in lines if step is None or line.get("step", 0) <= step]
    chance = _numbers(lines[-1].get("chance")) if lines else {}
    if best and (folder / _BEST).exists():
        require_unchanged(folder, str(folder), _BEST)
        try:
            return _numbers(json.loads((folder / _BEST).read_text()).get("figures")), chance
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / _BEST} cannot be read: {error}; put it right, or remove it") from None
    return (_numbers(lines[-1]["evaluation"]) if lines else {}), chance


def _numbers(values: object) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {str(name): float(value) for name, value in values.items() if isinstance(value, (int, float))}


_VERSIONS = ("torch", "transformers", "timm")
_PAPER = """\
> Chaoya Jiang, Wei Ye, Haiyang Xu, Ming Yan, Shikun Zhang, Jie Zhang, Fei Huang: *Vision Language Pre-training by
> Contrastive Learning with Cross-Modal Similarity Regulation*, ACL 2023, arXiv 2305.04474."""
_HF = """\
With transformers 5, and nothing else:

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{folder}")
classify("photo.jpg", candidate_labels=["a dog", "a cat"], tokenizer_kwargs={{"truncation": True}})
```

Features, of the length that they come out with; divide by it before you compare them:

```python
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{folder}"), AutoProcessor.from_pretrained("{folder}")
texts = processor(text=["a dog"], padding=True, truncation=True, return_tensors="pt")
features = model.get_text_features(**texts).pooler_output
```"""
_SAFETENSORS = """\
```python
import sacl_ds

model = sacl_ds.load("{folder}")
model.match(["photo.jpg"], ["a dog on a beach"])    # probability that they belong together
```

`model.encode_image` and `model.encode_text` give unit features, `checkpoint={folder}` fine-tunes it
(`launch/finetune.py`), `model.start={folder}` starts another pre-training from it."""


def card(source: ExportSource, form: str, dtype: str, name: str, widened: bool) -> str:
    """Write the text of the README.

    form: hf or safetensors. name: of the folder. widened: whether the image tower has a head of zeros.
    """
    front = {
        "library_name": "transformers" if form == "hf" else "sacl_ds",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["sacl", "vision-language", "image-text-retrieval", "contrastive-learning"],
    }
    usage = (_HF if form == "hf" else _SAFETENSORS).format(folder=_plain(name))
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_text(name)}",
        _what(source, form),
        "## Use",
        usage,
        "## The model and its training",
        _table(("", ""), _facts(source, dtype)),
        *_figures(source),
        "## Limits",
        "\n".join(f"* {line}" for line in _limits(source, form, widened)),
        "## Licence",
        "None is stated. Whoever publishes this states it, here and as `license` at the top, minding the licences of "
        "the data and of the weights that it started from.",
        "## Citing the method",
        _PAPER,
    ]
    return "\n\n".join(parts) + "\n"


def _what(source: ExportSource, form: str) -> str:
    task = source.settings.get("task")
    trained = f"pre-trained, then fine-tuned for {_text(task)}," if task else "pre-trained"
    loss = source.run.loss.contrastive if task is None else source.settings.get("loss", {}).get("contrastive")
    contrast = {
        "sacl": "contrastive learning regulated by cross-modal similarity (SACL)",
        "infonce": "plain contrastive learning (InfoNCE)",
    }.get(str(loss), "contrastive learning")
    holds = (
        "its two towers, as `ChineseCLIPModel` of transformers (Chinese in name only)"
        if form == "hf"
        else "all of it: both towers, the fusion encoder and the heads of image-text matching and masked words"
    )
    return f"A vision-language model, {trained} with {contrast}. This folder holds {holds}."


def _facts(source: ExportSource, dtype: str) -> list[tuple[str, str]]:
    settings, model = source.settings, source.run.model
    train, loss, teacher = (settings.get(room) or {} for room in ("train", "loss", "teacher"))
    parameters = sum(p.numel() for p in source.model.parameters())
    facts: list[tuple[str, Any]] = [
        ("image encoder", f"{_code(model.image_encoder)}, {model.image_size} pixels a side"),
        ("text encoder, fusion encoder", f"BERT layers, {model.text_layers} and {model.fusion_layers}, width "
         f"{model.text_width}, texts of at most {model.max_tokens} tokens"),
        ("shared space", f"{model.embed_dim} values"),
        ("parameters", f"{parameters:,} in the whole model"),
        ("weights", f"{dtype}, after step {source.step}" if source.step is not None else dtype),
        ("data", _data(settings.get("data") or {})),
        ("steps, pairs a step", f"{train.get('steps')}, {train.get('global_batch_size')}"),
        ("precision", train.get("precision")),
        ("contrastive loss", _loss(loss)),
        ("teacher", _teacher(teacher)),
        ("momentum model", "yes" if (settings.get("momentum") or {}).get("enabled") else None),
        ("versions", ", ".join([f"sacl_ds {__version__}", *(f"{name} {version(name)}" for name in _VERSIONS)])),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in facts if value is not None]


def _data(data: Mapping[str, Any]) -> str:
    if data.get("source") == "scenes":
        return "the generated scenes that come with sacl_ds, which are no photographs"
    shards = data.get("shards") or []
    names = [last_name(str(each)) for each in ([shards] if isinstance(shards, str) else shards)]
    return ", ".join(["image-text pairs", *map(_code, names)]) if names else "files of the task"


def _loss(loss: Mapping[str, Any]) -> str:
    shown = ("contrastive", "sharpness", "alpha_start", "alpha_end", "false_share", "matching_weight", "mlm_weight")
    return ", ".join(f"{_code(name)} {_text(loss[name])}" for name in shown if loss.get(name) is not None)


def _teacher(teacher: Mapping[str, Any]) -> str | None:
    if teacher.get("checkpoint"):
        return _code(last_name(str(teacher["checkpoint"])))
    return f"the same model, {teacher['steps']} steps of InfoNCE" if teacher.get("steps") else None


def _figures(source: ExportSource) -> list[str]:
    if not source.figures:
        return []
    rows = [
        (
            _text(name.replace("_to_", " → ").replace("_", " ")),
            f"{100 * value:.1f}",
            f"{100 * source.chance[name]:.1f}" if name in source.chance else "",
        )
        for name, value in source.figures.items()
    ]
    return [
        "## Figures",
        "Of the last evaluation before these weights, in per cent, on what the run held out:",
        _table(("", "%", "chance %"), rows),
    ]


def _limits(source: ExportSource, form: str, widened: bool) -> list[str]:
    lines = []
    if form == "hf":
        lines.append(
            "The towers alone cannot say whether an image and a text belong together other than by the angle between "
            "their features: image-text matching, re-ranking and masked words need the fusion encoder, which "
            "`tools/export_checkpoint.py --to safetensors` exports."
        )
        lines.append(
            f"Texts are read up to {source.run.model.max_tokens} tokens in training; give `truncation=True`, or longer "
            "ones may fail or mislead."
        )
    if widened:
        lines.append(
            "The class has a norm before the blocks, which this image encoder lacks. One more attention head and its "
            "channels make that norm the identity; they hold constants and zeros, which a training of this folder "
            "would change."
        )
    lines += [
        "A picture is seen by its middle square. Photographs that are turned by their EXIF entry are turned upright by "
        "sacl_ds, not by every other reader.",
        "It has learned what its data say, their errors and prejudices included.",
    ]
    return lines


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(value: object) -> str:
    """Replace characters that would break a quoted string in a program."""
    return re.sub(r"[^\w.+-]", "_", str(value)) or "model"


def _text(value: object) -> str:
    """Escape a user's text so that nothing in it is Markdown or HTML."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", line)


def _code(value: object) -> str:
    """Quote a user's text as Markdown code that is valid in a table as well."""
    line = " ".join(str(value).split()).replace("|", "¦")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"
