"""Steps that are both measured and estimated (`tools/measure_scaling.py`, docs/lab/scaling.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sacl_ds.config import RunConfig
from sacl_ds.ds_config import read_ds_config
from scaling.job import PlannedJob, Zero

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = 12  # a rank
LENGTH, PREDICTED, VOCABULARY, TEACHER = 12, 3, 2000, 48  # tokens of a caption, of them masked, words, feature width
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "image_encoder_arguments": {"embed_dim": 96, "depth": 3, "num_heads": 3, "patch_size": 8},
        "image_size": 48, "text_width": 96, "text_heads": 3, "text_layers": 1, "fusion_layers": 1, "embed_dim": 64,
    },
    "middle": {
        "image_encoder_arguments": {"embed_dim": 256, "depth": 6, "num_heads": 4, "patch_size": 8},
        "image_size": 64, "text_width": 256, "text_heads": 4, "text_layers": 3, "fusion_layers": 3, "embed_dim": 128,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Step that is measured. pairs: a rank. itc_alone: without ITM and MLM."""

    size: str
    pairs: int
    world: int
    stage: int
    precision: str
    offload: bool = False
    micro_batches: int = 1
    coalesced: bool = False
    checkpointed: bool = False
    itc_alone: bool = False

    @property
    def run(self) -> RunConfig:
        model = {**SIZES[self.size], "max_tokens": LENGTH, "vocab_size": VOCABULARY}
        train = {
            "global_batch_size": self.pairs * self.world, "micro_batch_size": max(1, self.pairs // self.micro_batches),
            "precision": self.precision, "coalesce_reduction": self.coalesced,
            "checkpoint_activations": self.checkpointed,
        }  # fmt: skip
        loss = {"matching_weight": 0.0, "mlm_weight": 0.0} if self.itc_alone else {}
        return RunConfig.model_validate({"model": model, "train": train, "loss": loss})

    @property
    def ds(self) -> dict[str, Any]:
        """DeepSpeed configuration as in ds_configs/, its buckets scaled down with the model."""
        if self.stage == 0:
            return {"zero_optimization": {"stage": 0}}
        found = read_ds_config(ROOT / f"ds_configs/zero{self.stage}{'_offload' if self.offload else ''}.json")
        smaller = {"reduce_bucket_size": 400_000, "allgather_bucket_size": 400_000}
        if self.stage == 3:
            smaller |= {"stage3_prefetch_bucket_size": 400_000, "stage3_param_persistence_threshold": 1000}
        found["zero_optimization"] |= smaller
        return found

    @property
    def job(self) -> PlannedJob:
        return PlannedJob(
            self.run, self.world, Zero.of(self.ds), predicted=PREDICTED, vocab_size=VOCABULARY, teacher_width=TEACHER
        )
