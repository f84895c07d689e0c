"""Inputs of the formulas of memory, traffic and time: a run, its ranks, and ZeRO's settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from sacl_ds.config import RunConfig
from sacl_ds.errors import UserError
from sacl_ds.model.cost import Cost, ModelCost

FLOAT, HALF = 4, 2  # bytes of a float32, and of what autocast computes with

# DeepSpeed's own values where a configuration says nothing (deepspeed/runtime/zero/config.py of 0.19)
_BUCKET, _LIVE, _PERSISTENT = 500_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class Zero:
    """The part of a DeepSpeed configuration that memory and traffic depend on.

    reduce_bucket: gradients, counted in numbers, that are reduced together. double: two such buckets, of which one is
    filled while the other travels. live: parameters that ZeRO 3 keeps whole at a time; persistent: parameters of fewer
    numbers stay whole for good. optimizer, parameters: where they are offloaded to, None: nowhere.
    """

    stage: int = 0
    reduce_bucket: int = _BUCKET
    double: bool = False
    live: int = _LIVE
    persistent: int = _PERSISTENT
    optimizer: str | None = None
    parameters: str | None = None

    @classmethod
    def of(cls, ds: dict[str, Any]) -> Zero:
        """Read the ZeRO settings of a DeepSpeed configuration, resolved or as in ds_configs/."""
        section = ds.get("zero_optimization", {})
        stage = int(section.get("stage", 0))

        def device(part: str) -> str | None:
            name = (section.get(part) or {}).get("device", "none")
            return None if name == "none" else str(name)

        return cls(
            stage=stage,
            reduce_bucket=int(section.get("reduce_bucket_size", _BUCKET)),
            double=bool(section.get("overlap_comm", stage == 3)),
            live=int(section.get("stage3_max_live_parameters", _LIVE)),
            persistent=int(section.get("stage3_param_persistence_threshold", _PERSISTENT)),
            optimizer=device("offload_optimizer"),
            parameters=device("offload_param"),
        )


@dataclass(frozen=True)
class PlannedJob:
    """Pre-training run on `world` ranks whose teacher's features are stored.

    A teacher that runs beside it adds its own weights and forward pass. text_tokens, predicted, vocab_size: as for
    `ModelCost`. teacher_width: of the teacher's features, 0 without one. id_columns: ids of a pair, by which its
    duplicates are known. Raises UserError where the batch does not divide.
    """

    run: RunConfig
    world: int
    zero: Zero
    text_tokens: int | None = None
    predicted: float | None = None
    vocab_size: int | None = None
    teacher_width: int = 0
    id_columns: int = 2

    def __post_init__(self) -> None:
        if self.world < 1:
            raise UserError(f"a run on {self.world} ranks: take 1 or more")
        self.run.micro_batches(self.world)

    @cached_property
    def cost(self) -> ModelCost:
        made = ModelCost(
            self.run.model, text_tokens=self.text_tokens, predicted=self.predicted, vocab_size=self.vocab_size
        )
        made.model.train_for(matching="itm" in self.run.losses, words="mlm" in self.run.losses)
        return made

    @cached_property
    def pair(self) -> Cost:
        """Cost of a pair's forward, with the losses that the run has."""
        return self.cost.pretraining(self.run.losses)

    @property
    def pairs(self) -> int:
        """Pairs of the global batch per rank."""
        return self.run.train.global_batch_size // self.world

    @property
    def at_once(self) -> int:
        """Number of pairs that pass through the model together."""
        return self.run.micro_batches(self.world)[0]

    @property
    def parts(self) -> int:
        """Number of micro-batches of a step."""
        return self.run.micro_batches(self.world)[1]

    @property
    def checkpointed(self) -> bool:
        """Whether backward computes each block again."""
        return self.run.train.checkpoint_activations

    @property
    def reductions(self) -> int:
        """Number of gradient reductions of a step: ZeRO 0 and 1 keep them whole until the last micro-batch."""
        return self.parts if self.zero.stage > 1 and self.reduced_in_backward else 1

    @property
    def reduced_in_backward(self) -> bool:
        """Whether gradients are reduced during backward, and not all at once after that of the last micro-batch."""
        return self.parts == 1 or not self.run.train.coalesce_reduction

    @cached_property
    def sizes(self) -> list[tuple[int, bool]]:
        """Number of elements of each trained parameter, and whether autocast computes with it in half precision.

        DeepSpeed sends those and their gradients in half precision: weights of plain linear layers and convolutions.
        """
        return self._sizes(self.cost.model, trained=True)

    @cached_property
    def untrained_sizes(self) -> list[tuple[int, bool]]:
        """Same as `sizes`, for parameters that no loss reaches: no forward pass asks for them, and no optimizer."""
        return self._sizes(self.cost.model, trained=False)

    @cached_property
    def late_sizes(self) -> list[tuple[int, bool]]:
        """Same as `sizes`, for parameters that the first pass of micro-batches, for ITC's features, does without."""
        model = self.cost.model
        late = (model.fusion_encoder, model.matching_head, model.mlm_head)
        return [each for part in late for each in self._sizes(part, trained=True)]

    def _sizes(self, module: nn.Module, trained: bool) -> list[tuple[int, bool]]:
        found: dict[int, tuple[int, bool]] = {}
        for part in module.modules():
            cast = self.autocast and type(part) in (nn.Linear, nn.Conv2d)
            for parameter in part.parameters(recurse=False):
                if parameter.requires_grad is not trained:
                    continue
                found.setdefault(id(parameter), (parameter.numel(), cast))
        return list(found.values())

    @property
    def autocast(self) -> bool:
        return self.run.train.precision != "fp32"

    @cached_property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(size for size, _ in self.sizes)

    @cached_property
    def cast(self) -> int:
        """Number of trained parameters that autocast also holds in half precision."""
        return sum(size for size, cast in self.sizes if cast)

    @property
    def shard(self) -> int:
        """Number of trained parameters whose optimizer state a rank keeps.

        Under ZeRO 3 every tensor is cut in equal parts, under ZeRO 1 and 2 all of them together.
        """
        if self.zero.stage == 0:
            return self.parameters
        if self.zero.stage == 3:
            return self.cut(self.sizes)
        return -(-self.parameters // self.world)

    def cut(self, sizes: list[tuple[int, bool]]) -> int:
        """Return a rank's elements where every one of these tensors is cut in equal parts."""
        return sum(-(-size // self.world) for size, _ in sizes)
