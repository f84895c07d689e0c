"""The configuration of runs: one strict model per section; fine-tuning's is in `sacl_ds.config.finetune`."""

from sacl_ds.config.data import CaptionFilter, DataConfig, Detail, ScenesConfig
from sacl_ds.config.loss import LossConfig, MomentumConfig, TeacherConfig
from sacl_ds.config.model import PRESETS, ModelConfig, PatchSelectionConfig
from sacl_ds.config.training import KernelsConfig, OptimConfig, RecordsConfig, RunConfig, TrainConfig, TrainingConfig

__all__ = [
    "PRESETS",
    "CaptionFilter",
    "DataConfig",
    "Detail",
    "KernelsConfig",
    "LossConfig",
    "ModelConfig",
    "MomentumConfig",
    "OptimConfig",
    "PatchSelectionConfig",
    "RecordsConfig",
    "RunConfig",
    "ScenesConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainingConfig",
]
