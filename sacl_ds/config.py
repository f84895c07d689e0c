"""The run configuration: one strict model per room, read from defaults, a YAML file and key=value arguments.

Defaults are the built-in run: scenes, `tiny` preset, minutes on two CPU cores. `load_config` reports what is wrong as
one line that names the key, where it was set, and the nearest valid name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sacl_ds.errors import UserError, nearest

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NaturalFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_encoder": "vit_tiny_patch16_224",
        "image_encoder_arguments": {"embed_dim": 128, "depth": 3, "num_heads": 4, "patch_size": 16},
        "image_pretrained": False,
        "image_size": 48,
        "text_encoder": None,
        "text_width": 128,
        "text_heads": 4,
        "text_layers": 2,
        "fusion_layers": 1,
        "embed_dim": 128,
        "dropout": 0.0,
        "init_gain": 1.4,
        "vocab_size": 4000,
        "max_tokens": 32,
    },
    "base": {
        "image_encoder": "vit_base_patch16_clip_224.openai",
        "image_encoder_arguments": {},
        "image_pretrained": True,
        "image_size": 256,
        "text_encoder": "google-bert/bert-base-uncased",
        "text_width": 768,
        "text_heads": 12,
        "text_layers": 6,
        "fusion_layers": 6,
        "embed_dim": 256,
        "dropout": 0.1,
        "init_gain": None,
        "vocab_size": 30522,
        "max_tokens": 30,
    },
}


class _Room(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, validate_default=True, frozen=True)


class ScenesConfig(_Room):
    """The built-in data set (`sacl_ds.data.scenes`)."""

    seed: Natural = Field(1, description="seed of the training scenes; held-out scenes come from seed + 1000")
    count: Positive = Field(1_000_000, description="training scenes in an epoch; made on the fly, so it costs nothing")
    detail: Literal["partial", "simple"] = Field("partial", description="simple: one object, its colour and shape")
    eval_count: Positive = Field(500, description="held-out scenes")


class DataConfig(_Room):
    source: Literal["scenes", "shards"] = Field("scenes", description="where image-text pairs come from")
    shards: str | None = Field(
        None, description="webdataset tars for training, braces allowed: '/data/{00000..00331}.tar'"
    )
    eval_shards: str | None = Field(None, description="webdataset tars for held-out retrieval; none: no retrieval")
    eval_count: Positive | None = Field(None, description="at most so many held-out images; none: all of eval_shards")
    scenes: ScenesConfig = ScenesConfig()
    workers: Natural | None = Field(
        None, description="loader processes a rank; none: the cores it has to spare, at most 8"
    )
    streams: Positive = Field(16, description="shards read side by side over all ranks; part of the data order")
    shuffle_buffer: Positive = Field(2048, description="samples shuffled together in a stream; part of the data order")
    augment: Literal["auto", "none", "crop"] = Field(
        "auto",
        description="crop: random resized crop; auto: crop for shards, none for scenes, whose captions it falsifies",
    )
    crop_scale: tuple[Fraction, Fraction] = Field((0.5, 1.0), description="share of the picture that a crop keeps")
    flip: bool = Field(False, description="mirror half of the pictures; falsifies captions that say left or right")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.source == "shards" and not self.shards:
            raise ValueError("data.source=shards needs data.shards='/path/{00000..00099}.tar'")
        if self.source == "scenes" and (self.augment == "crop" or self.flip):
            raise ValueError("crops and flips falsify the captions of scenes; set data.augment=none data.flip=false")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={list(self.crop_scale)}: two shares, the smaller one first and above 0")
        return self

    @property
    def crops(self) -> bool:
        return self.augment == "crop" or (self.augment == "auto" and self.source == "shards")


class ModelConfig(_Room):
    """Fields left out come from the preset."""

    preset: Literal["tiny", "base"] = Field("tiny", description="tiny: CPU minutes, from scratch; base: the paper's")
    image_encoder: str = Field(description="timm name, or 'local-dir:/path' of a timm model folder")
    image_encoder_arguments: dict[str, Any] = Field(description="arguments of timm.create_model: depth, embed_dim, ...")
    image_pretrained: bool = Field(description="start from timm's published weights of image_encoder")
    image_size: Positive = Field(description="pixels a side")
    image_mean: tuple[float, float, float] = Field(_CLIP_MEAN, description="pixel normalisation, of values in [0, 1]")
    image_std: tuple[float, float, float] = Field(_CLIP_STD, description="pixel normalisation, of values in [0, 1]")
    text_encoder: str | None = Field(description="hub name or folder of a BERT to start from and take the tokenizer of")
    text_width: Positive = Field(description="width of the text and fusion encoders")
    text_heads: Positive = Field(description="attention heads of the text and fusion encoders")
    text_layers: Positive = Field(description="lower BERT layers, on text alone")
    fusion_layers: Positive = Field(description="upper BERT layers, with cross-attention to the image")
    embed_dim: Positive = Field(description="width of the shared image-text space")
    dropout: Fraction = Field(description="in the text and fusion encoders")
    vocab_size: Positive = Field(description="largest WordPiece vocabulary trained where text_encoder is none")
    max_tokens: Positive = Field(description="captions are cut to so many tokens, [CLS] and [SEP] included")
    init_gain: PositiveFloat | None = Field(
        description="weights that start from scratch: deviation init_gain / sqrt(width); none: the libraries' 0.02"
    )
    init_temperature: PositiveFloat = Field(0.07, description="temperature at the start; learned from there")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**PRESETS.get(values.get("preset", "tiny"), {}), **values}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.text_width % self.text_heads:
            raise ValueError(
                f"model.text_width={self.text_width} must be a multiple of model.text_heads={self.text_heads}"
            )
        if not 0.01 <= self.init_temperature <= 1:
            raise ValueError(
                f"model.init_temperature={self.init_temperature} must lie in [0.01, 1] (logit scale 1 to 100)"
            )
        return self


class LossConfig(_Room):
    contrastive: Literal["sacl", "infonce"] = Field("sacl", description="infonce: every negative weighs 1")
    sharpness: NaturalFloat = Field(
        3.0, description="kappa: how fast weight falls with similarity; 1 is the bare paper"
    )
    teacher_sharpness: NaturalFloat | None = Field(None, description="kappa_t, for the teacher; none: like sharpness")
    alpha_start: Fraction = Field(1.0, description="the teacher's share of the similarity at step 0")
    alpha_end: Fraction = Field(0.5, description="the teacher's share from alpha_end_step on")
    alpha_end_step: Natural | None = Field(
        None, description="where the linear hand-over ends; none: half of train.steps"
    )
    negative_mass: PositiveFloat = Field(1.0, description="mean weight of the negatives; 1 is the paper's condition 2")
    drop_below: PositiveFloat | None = Field(None, description="remove negatives lighter than this (paper section 4.3)")
    contrastive_weight: NaturalFloat = Field(1.0, description="factor of ITC in the sum of losses")
    matching_weight: NaturalFloat = Field(1.0, description="factor of ITM; 0 skips its passes")
    mlm_weight: NaturalFloat = Field(1.0, description="factor of MLM; 0 skips its passes")
    matching_hardness: NaturalFloat = Field(
        0.25, description="ITM's negatives are drawn in proportion to e^(this * z); 1: as ALBEF, 0: at random"
    )
    mlm_probability: Fraction = Field(0.15, description="share of the tokens that MLM predicts")
    backend: Literal["auto", "reference"] = Field("auto", description="which computation of the contrastive loss")


class TeacherConfig(_Room):
    """The frozen teacher whose similarity regulates the negatives at first."""

    checkpoint: str | None = Field(None, description="run directory of a trained teacher (launch/configs/teacher.yaml)")
    steps: Natural = Field(300, description="without checkpoint: train one first, for so many steps; 0: no teacher")
    detail: Literal["partial", "simple"] = Field("simple", description="captions of the scenes it learns from")
    shards: str | None = Field(None, description="clean captioned shards it learns from; none: data.shards")


class OptimConfig(_Room):
    lr_image: PositiveFloat = Field(1e-3, description="peak learning rate of the image encoder")
    lr_text: PositiveFloat = Field(1e-3, description="peak learning rate of everything else")
    weight_decay: NaturalFloat = Field(0.01, description="decoupled; on matrices only")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.98), description="AdamW")
    eps: PositiveFloat = Field(1e-8, description="AdamW")
    warmup_steps: Natural = Field(100, description="linear, from 0")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    final_lr: Fraction = Field(0.01, description="share of the peak learning rate where cosine ends")
    clip_norm: NaturalFloat = Field(1.0, description="global gradient norm; 0: no clipping")


class TrainConfig(_Room):
    steps: Natural = Field(500, description="optimizer steps")
    global_batch_size: Positive = Field(128, description="pairs contrasted with each other in a step, over all ranks")
    micro_batch_size: Positive | None = Field(None, description="pairs a rank; none: global_batch_size / ranks")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; parameters and losses stay fp32")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    eval_every: Positive | None = Field(100, description="steps between held-out retrievals; none: only at the end")
    save_every: Positive | None = Field(None, description="steps between checkpoints; none: only at the end")


class RunConfig(_Room):
    output_dir: str | None = Field(
        None, description="run directory; none: runs/scenes-001, -002 and so on, or the last of them with --resume"
    )
    seed: Natural = Field(0, description="of initial weights, data order, masking and dropout")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig.model_validate({})
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @property
    def alpha_end_step(self) -> int:
        return self.train.steps // 2 if self.loss.alpha_end_step is None else self.loss.alpha_end_step

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss asks for a frozen teacher at any step."""
        available = self.teacher.checkpoint is not None or self.teacher.steps > 0
        return self.loss.contrastive == "sacl" and available and max(self.loss.alpha_start, self.loss.alpha_end) > 0

    def micro_batch_size(self, world: int) -> int:
        """Pairs a rank, after checking that the global batch divides over `world` ranks in one pass."""
        total, micro = self.train.global_batch_size, self.train.micro_batch_size
        if total % world:
            raise UserError(
                f"train.global_batch_size={total} does not divide over {world} ranks; "
                f"take {math.ceil(total / world) * world}, or another number of ranks"
            )
        if micro is not None and micro * world != total:
            raise UserError(
                f"train.micro_batch_size={micro} on {world} ranks makes {micro * world} pairs a step, not "
                f"train.global_batch_size={total}; gradient accumulation is not supported yet: leave it out"
            )
        return total // world

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def load_config(file: str | Path | None, overrides: list[str]) -> RunConfig:
    """Defaults, then the YAML file, then key=value arguments such as 'train.steps=500'.

    Raises UserError, one line, for what cannot be read or is not valid.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if file is not None:
        layers.append((f"in {file}", _read_yaml(Path(file))))
    for argument in overrides:
        layers.append((f"in argument {argument!r}", _parse_override(argument)))
    merged: dict[str, Any] = {}
    for _, layer in layers:
        _merge(merged, layer)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, layers)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: a configuration is a mapping such as 'train: {{steps: 100}}', not {type(loaded).__name__}"
        )
    return loaded


def _parse_override(argument: str) -> dict[str, Any]:
    key, separator, text = argument.partition("=")
    if not separator or not key:
        raise UserError(f"argument {argument!r}: expected key=value, e.g. train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        value = _number(value)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _number(text: str) -> str | float:
    """YAML reads 1e-4 as a string; people mean a number."""
    try:
        return float(text) if "e" in text.lower() and any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _explain(error: ValidationError, layers: list[tuple[str, dict[str, Any]]]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = _where(path, layers)
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} {where}{_hint(path)}".replace("  ", " ")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{message} ({where})" if where else message
    value = first["input"]
    shown = f", not {value!r}" if not isinstance(value, dict) else ""
    return f"{key} {where}: {message[0].lower()}{message[1:]}{shown}".replace("  ", " ")


def _hint(path: list[str]) -> str:
    """The nearest valid key beside the unknown one, else the same name in other rooms, else what there is."""
    valid = _keys_at(path[:-1])
    close = nearest(path[-1], valid)
    if close:
        return f" (did you mean {_full(path[:-1], close)!r}?)"
    known = [(room, name) for room in [[], *_rooms()] for name in _keys_at(room)]
    close = nearest(path[-1], {name for _, name in known})
    if close:
        return f" (did you mean {' or '.join(repr(_full(room, name)) for room, name in known if name == close)}?)"
    return f"; here are: {', '.join(valid)}"


def _where(path: list[str], layers: list[tuple[str, dict[str, Any]]]) -> str:
    """The last layer that sets the key, or one above it."""
    for place, layer in reversed(layers):
        value: Any = layer
        depth = 0
        while depth < len(path) and isinstance(value, dict) and path[depth] in value:
            value = value[path[depth]]
            depth += 1
        if depth == len(path) or (depth and not isinstance(value, dict)):
            return place
    return ""


def _model_at(path: list[str]) -> type[BaseModel] | None:
    model: type[BaseModel] = RunConfig
    for part in path:
        field = model.model_fields.get(part)
        found = [t for t in (field.annotation, *get_args(field.annotation)) if _is_room(t)] if field else []
        if not found:
            return None
        model = found[0]
    return model


def _is_room(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _keys_at(path: list[str]) -> list[str]:
    model = _model_at(path)
    return list(model.model_fields) if model else []


def _rooms(path: tuple[str, ...] = ()) -> list[list[str]]:
    found: list[list[str]] = []
    for key in _keys_at(list(path)):
        inner = [*path, key]
        if _model_at(inner) is not None:
            found += [inner, *_rooms(tuple(inner))]
    return found


def _full(room: list[str], key: str) -> str:
    return ".".join([*room, key])
