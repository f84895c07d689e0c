"""The run configuration: one strict model per room. Defaults are the built-in run: minutes on two CPU cores."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sacl_ds.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NaturalFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Detail = Literal["partial", "simple", "detailed"]

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
        "image_encoder": "vit_base_patch16_clip_quickgelu_224.openai",
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
    detail: Detail = Field(
        "partial", description="simple: one object, its colour and shape; detailed: much of one or two objects"
    )
    eval_count: Positive = Field(500, description="held-out scenes")


class CaptionFilter(_Room):
    """Which captions may be drawn; a sample without one is replaced and counted."""

    min_words: Natural = Field(0, description="shortest caption")
    max_words: Positive | None = Field(None, description="longest caption; null: any")
    exclude: str | None = Field(None, description="captions in which this regular expression is found are left out")

    @field_validator("exclude")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"data.captions.exclude={value!r} is no regular expression: {error}") from None
        return value

    @property
    def accepts_all(self) -> bool:
        return self.min_words <= 1 and self.max_words is None and self.exclude is None


class DataConfig(_Room):
    source: Literal["scenes", "shards"] = Field("scenes", description="where image-text pairs come from")
    shards: str | list[str] | None = Field(
        None,
        description="webdataset tars for training: '/data/{00000..00331}.tar', '@list.txt', http(s), s3, 'pipe:...'; "
        "or several of these",
    )
    weights: list[PositiveFloat] | None = Field(
        None, description="share of each of several data.shards in every batch; null: one set, by its sizes"
    )
    eval_shards: str | None = Field(None, description="webdataset tars for held-out retrieval; null: no retrieval")
    eval_count: Positive | None = Field(None, description="at most so many held-out images; null: all of eval_shards")
    scenes: ScenesConfig = ScenesConfig()
    workers: Natural | None = Field(
        None, description="loader processes a rank; null: the cores it has to spare, at most 8"
    )
    streams: Positive = Field(64, description="shards read side by side over all ranks; part of the data order")
    shuffle_buffer: Positive = Field(
        32768, description="samples held encoded for shuffling, over all streams and ranks; part of the data order"
    )
    duplicates: Literal["image+caption", "image", "none"] = Field(
        "image+caption", description="what makes two pairs of a batch no negatives of each other, where it is the same"
    )
    grouping: str | None = Field(
        None,
        description="parquet or CSV of key, group and perhaps shard, as tools/weight_analysis.py suspects writes it: "
        "samples of one group are no negatives of each other either",
    )
    captions: CaptionFilter = CaptionFilter()
    max_bad_share: Fraction = Field(
        0.05, description="stop where more samples than this cannot be used; until then others stand in for them"
    )
    attempts: Positive = Field(3, description="times that a shard on a server is opened before it is given up")
    stall_seconds: PositiveFloat = Field(60, description="break off a shard that gives nothing for so long")
    cache_dir: str | None = Field(None, description="keep shards from servers in this folder; null: read them anew")
    cache_gb: PositiveFloat = Field(100, description="size of that folder; what was not used for longest goes first")
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
        if self.weights is not None:
            sets = [self.shards] if isinstance(self.shards, str) else self.shards or []
            if len(sets) != len(self.weights):
                raise ValueError(f"data.weights has {len(self.weights)} numbers for {len(sets)} entries of data.shards")
            if min(self.weights) < sum(self.weights) / 1000:
                raise ValueError("data.weights: each is at least a thousandth of their sum")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={list(self.crop_scale)}: two shares, the smaller one first and above 0")
        return self

    @property
    def crops(self) -> bool:
        return self.augment == "crop" or (self.augment == "auto" and self.source == "shards")


class PatchSelectionConfig(_Room):
    """Fewer image tokens, chosen by what the text asks for (`sacl_ds.model.patch_selection`, docs/patches.md)."""

    placement: Literal["none", "tower", "output", "published"] = Field(
        "none",
        description="where patches are left out: tower: inside the image encoder, anew for every text (VQA, NLVR2); "
        "output: behind it (pre-training, re-ranking); published: inside, by the image's own caption, which ITC "
        "can then see through the image",
    )
    layers: list[Positive] = Field([5, 10], description="layers, from 1, behind whose attention the tower selects")
    keep_rate: Fraction = Field(0.7, description="share of the patches that each selection keeps; output selects once")
    guide: Literal["text", "cls", "random"] = Field(
        "text", description="who chooses: the text's [CLS], or, to compare with, the image's [CLS] or chance"
    )
    score: Literal["keys", "tokens"] = Field(
        "keys", description="what the text's query is compared with: keys of the attention, or tokens (published)"
    )

    @model_validator(mode="after")
    def _check(self) -> PatchSelectionConfig:
        if self.placement != "none" and not self.layers:
            raise ValueError("model.patch_selection.layers is empty; name at least one layer, or placement=none")
        if self.keep_rate == 0:
            raise ValueError("model.patch_selection.keep_rate=0.0 keeps no patch; give a share above 0")
        return self


class ModelConfig(_Room):
    """Fields left out come from the preset."""

    preset: Literal["tiny", "base"] = Field("tiny", description="tiny: CPU minutes, from scratch; base: the paper's")
    image_encoder: str = Field(description="timm name, or 'local-dir:/path' of a timm model folder")
    image_encoder_arguments: dict[str, Any] = Field(description="arguments of timm.create_model: depth, embed_dim, ...")
    image_pretrained: bool = Field(description="start from timm's published weights of image_encoder")
    image_weights: str | None = Field(
        None,
        description="start image_encoder from these, not timm's: a CLIP of transformers by folder or hub name, or a "
        "file of weights in the layout of OpenAI's CLIP, open_clip, transformers or timm",
    )
    image_size: Positive = Field(description="pixels a side")
    image_mean: tuple[float, float, float] = Field(_CLIP_MEAN, description="pixel normalisation, of values in [0, 1]")
    image_std: tuple[float, float, float] = Field(_CLIP_STD, description="pixel normalisation, of values in [0, 1]")
    text_encoder: str | None = Field(description="hub name or folder of a BERT to start from and take the tokenizer of")
    start: str | None = Field(
        None,
        description="start the whole model from this: a file in ALBEF's layout (text_encoder gives the tokenizer), "
        "or the directory of a finished run",
    )
    text_width: Positive = Field(description="width of the text and fusion encoders")
    text_heads: Positive = Field(description="attention heads of the text and fusion encoders")
    text_layers: Positive = Field(description="lower BERT layers, on text alone")
    fusion_layers: Positive = Field(description="upper BERT layers, with cross-attention to the image")
    embed_dim: Positive = Field(description="width of the shared image-text space")
    dropout: Fraction = Field(description="in the text and fusion encoders")
    vocab_size: Positive = Field(description="largest WordPiece vocabulary trained where text_encoder is none")
    max_tokens: Positive = Field(description="captions are cut to so many tokens, [CLS] and [SEP] included")
    max_positions: Positive | None = Field(
        None, description="longest text that the text encoder could read; null: as start or text_encoder, or max_tokens"
    )
    init_gain: PositiveFloat | None = Field(
        description="weights that start from scratch: deviation init_gain / sqrt(width); null: the libraries' 0.02"
    )
    patch_selection: PatchSelectionConfig = PatchSelectionConfig()
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
        if self.start and self.image_weights:
            raise ValueError("model.start brings the image encoder's weights; leave out one of the two")
        if self.max_positions is not None and self.max_positions < self.max_tokens:
            raise ValueError(
                f"model.max_positions={self.max_positions} is less than model.max_tokens={self.max_tokens}; "
                "give it as much, or leave it out"
            )
        return self

    @property
    def timm_weights(self) -> bool:
        """Whether timm's published weights are loaded: where no setting names others."""
        return self.image_pretrained and not self.image_weights and not self.start


class LossConfig(_Room):
    contrastive: Literal["sacl", "infonce"] = Field("sacl", description="infonce: every negative weighs 1")
    sharpness: NaturalFloat = Field(
        3.0, description="kappa: how fast weight falls with similarity; 1 is the bare paper"
    )
    teacher_sharpness: NaturalFloat | None = Field(
        None, description="kappa_t, for the teacher; null: like sharpness, or 30 with false_share"
    )
    false_share: Fraction | None = Field(
        None,
        description="share of the pairs that the teacher takes for false negatives: weights are even for the others "
        "and fall steeply for these (sets sharpness and alpha before training); null: e^(kappa c)",
    )
    alpha_start: Fraction = Field(1.0, description="the teacher's share of the similarity at step 0")
    alpha_end: Fraction = Field(
        1.0, description="the teacher's share from alpha_end_step on; less hands over to the model itself"
    )
    alpha_end_step: Natural | None = Field(
        None, description="where the linear hand-over ends; null: half of train.steps"
    )
    negative_mass: PositiveFloat = Field(1.0, description="mean weight of the negatives; 1 is the paper's condition 2")
    drop_below: PositiveFloat | None = Field(None, description="remove negatives lighter than this (paper section 4.3)")
    contrastive_weight: NaturalFloat = Field(1.0, description="factor of ITC in the sum of losses")
    matching_weight: NaturalFloat = Field(1.0, description="factor of ITM; 0 skips its passes")
    mlm_weight: NaturalFloat = Field(1.0, description="factor of MLM; 0 skips its passes")
    matching_hardness: NaturalFloat = Field(
        0.25, description="ITM's negatives are drawn in proportion to e^(this * z); 1: as ALBEF, 0: at random"
    )
    matching_regulated: bool = Field(
        False, description="draw those in proportion to w e^(hardness * z): false negatives are no hard ones"
    )
    mlm_probability: Fraction = Field(0.15, description="share of the tokens that MLM predicts")
    backend: Literal["auto", "reference", "streaming", "triton"] = Field(
        "auto", description="computation of the contrastive loss; auto: triton on CUDA, else streaming"
    )


class MomentumConfig(_Room):
    """ALBEF's momentum parts (docs/method.md); off, the model is compared with itself alone."""

    enabled: bool = Field(False, description="compare with keys from an average of the model, and a queue of them")
    decay: float = Field(0.995, ge=0, lt=1, description="of that average, a step; 0: the model itself")
    queue_size: Natural = Field(65536, description="earlier pairs whose keys are negatives too; 0: none")
    distill_weight: Fraction = Field(
        0.4, description="share of soft targets in ITC and MLM; from 0, linearly over the first epoch; 0: none"
    )
    regulate_queue: bool = Field(
        True, description="weigh the queue's negatives like the batch's; false: each weighs loss.negative_mass"
    )


class TeacherConfig(_Room):
    """The frozen teacher whose similarity regulates the negatives at first."""

    checkpoint: str | None = Field(None, description="run directory of a trained teacher (launch/configs/teacher.yaml)")
    steps: Natural = Field(300, description="without checkpoint: train one first, for so many steps; 0: no teacher")
    detail: Detail = Field("partial", description="captions of the scenes it learns from, as data.scenes.detail")
    shards: str | None = Field(None, description="clean captioned shards it learns from; null: data.shards")
    features: str | None = Field(
        None,
        description="folder of features by tools/precompute_teacher.py, or 'beside' the shards; null: run the teacher",
    )


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
    micro_batch_size: Positive | None = Field(None, description="pairs a rank; null: global_batch_size / ranks")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; parameters and losses stay fp32")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    eval_every: Positive | None = Field(100, description="steps between held-out retrievals; null: only at the end")
    save_every: Positive | None = Field(None, description="steps between checkpoints; null: only at the end")


class RecordsConfig(_Room):
    """What the negatives weigh, in weights/ of the run directory (docs/weights.md)."""

    every: Natural | None = Field(100, description="steps between records, besides the first and last; 0 or null: none")
    lowest: Natural = Field(64, description="pairs of least weight kept in each record, for both directions")


class KernelsConfig(_Room):
    apex: Literal["auto", "on", "off"] = Field(
        "auto", description="NVIDIA apex's FusedAdam and FusedLayerNorm; auto: where it is installed and there is a GPU"
    )

    @field_validator("apex", mode="before")
    @classmethod
    def _on_and_off(cls, value: Any) -> Any:
        """YAML reads on and off as truth values."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class RunConfig(_Room):
    output_dir: str | None = Field(
        None, description="run directory; null: runs/scenes-001, -002 and so on, or the last of them with --resume"
    )
    seed: Natural = Field(0, description="of initial weights, data order, masking and dropout")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig.model_validate({})
    loss: LossConfig = LossConfig()
    momentum: MomentumConfig = MomentumConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    records: RecordsConfig = RecordsConfig()
    kernels: KernelsConfig = KernelsConfig()

    @model_validator(mode="after")
    def _features_are_somebodys(self) -> RunConfig:
        if self.teacher.features and (not self.teacher.checkpoint or self.data.source != "shards"):
            raise ValueError(
                "teacher.features are of a teacher and of shards; give teacher.checkpoint and data.source=shards"
            )
        return self

    @model_validator(mode="after")
    def _false_share_needs_a_teacher(self) -> RunConfig:
        share = self.loss.false_share
        if share is not None and not 0 < share < 1:
            raise ValueError(f"loss.false_share={share}: a share between 0 and 1, or null")
        if share is not None and not self.uses_teacher:
            raise ValueError(
                f"loss.false_share={share} needs a teacher and loss.contrastive=sacl; give teacher.checkpoint or "
                "teacher.steps, or leave it out"
            )
        return self

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
