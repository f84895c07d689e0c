"""Settings of the pre-training data."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sacl_ds.config.room import Fraction, Natural, PathText, Positive, PositiveFloat, Room

Detail = Literal["partial", "simple", "detailed"]


class ScenesConfig(Room):
    """The built-in data set (`sacl_ds.data.scenes`)."""

    seed: Natural = Field(1, description="seed of the training scenes; held-out scenes come from seed + 1000")
    count: Positive = Field(1_000_000, description="training scenes in an epoch; made on the fly, so it costs nothing")
    detail: Detail = Field(
        "partial", description="simple: one object, its colour and shape; detailed: much of one or two objects"
    )
    eval_count: Positive = Field(500, description="held-out scenes")


class CaptionFilter(Room):
    """Conditions on captions that may be drawn; a sample without one is replaced and counted."""

    min_words: Natural = Field(0, description="shortest caption")
    max_words: Positive | None = Field(None, description="longest caption; null: any")
    exclude: str | None = Field(None, description="captions in which this regular expression is found are left out")

    @field_validator("exclude")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"data.captions.exclude={value!r:.200} is no regular expression: {error}") from None
        return value

    @property
    def accepts_all(self) -> bool:
        return self.min_words <= 1 and self.max_words is None and self.exclude is None


class DataConfig(Room):
    source: Literal["scenes", "shards"] = Field("scenes", description="where image-text pairs come from")
    shards: str | list[str] | None = Field(
        None,
        description="webdataset tars for training: '/data/{00000..00331}.tar', '@list.txt', http(s), s3, 'pipe:...'; "
        "or several of these",
    )
    allow_missing: Natural = Field(
        0,
        description="so many of data.shards may be missing: they are named and stay out on --resume",
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
        32768, description="samples held encoded for shuffling, over all ranks; part of the data order"
    )
    duplicates: Literal["image+caption", "image", "none"] = Field(
        "image+caption", description="pairs with the same are no negatives of each other"
    )
    grouping: PathText | None = Field(
        None,
        description="parquet or CSV of key, group and perhaps shard (weight_analysis.py suspects): samples of one "
        "group are no negatives of each other",
    )
    captions: CaptionFilter = CaptionFilter()
    max_bad_share: Fraction = Field(
        0.05, description="stop where more samples than this cannot be used; until then others stand in for them"
    )
    attempts: Positive = Field(3, description="times that a shard on a server is opened before it is given up")
    stall_seconds: PositiveFloat = Field(60, description="break off a shard that gives nothing for so long")
    cache_dir: PathText | None = Field(
        None, description="keep shards from servers in this folder; null: read them anew"
    )
    cache_gb: PositiveFloat = Field(100, description="size of that folder; what was not used for longest goes first")
    augment: Literal["auto", "none", "crop"] = Field(
        "auto",
        description="crop: random resized crop; auto: crop for shards, none for scenes",
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
            if not self.weights or min(self.weights) < sum(self.weights) / 1000:
                raise ValueError("data.weights: each is at least a thousandth of their sum")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={list(self.crop_scale)}: two shares, the smaller one first and above 0")
        return self

    @property
    def crops(self) -> bool:
        return self.augment == "crop" or (self.augment == "auto" and self.source == "shards")
