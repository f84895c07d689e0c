"""What a run asks of how its model computes, done to the model before the engine takes it."""

from __future__ import annotations

from sacl_ds.config import TrainingConfig
from sacl_ds.ds_config import EngineConfig
from sacl_ds.model.fused_norm import use_fused_layer_norm
from sacl_ds.model.nlvr2 import Nlvr2Model
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.vqa import VqaModel


def prepare_model(model: SaclModel | VqaModel | Nlvr2Model, run: TrainingConfig, engine: EngineConfig) -> None:
    """Fused norms, activation checkpointing, compilation: what of these the configurations ask for. In place."""
    if engine.fused_norm:
        use_fused_layer_norm(model)
    if run.train.checkpoint_activations:
        model.checkpoint_activations()
    if run.kernels.compile:
        model.compile_layers()
