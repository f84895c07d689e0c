"""Runs on disk without a training: a very small model with random weights, saved as a run saves its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sacl_ds.config import RunConfig
from sacl_ds.data.sources import training_source
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG, TOKENIZER, save_weights

_MODEL = {
    "image_encoder_arguments": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16},
    "text_width": 32, "text_heads": 2, "text_layers": 1, "embed_dim": 16,
}  # fmt: skip


def saved_run(folder: Path, seed: int, *, teacher: bool = True, count: int = 40, **loss: Any) -> Path:
    """A finished run on scenes, with its teacher inside; `count` held-out scenes."""
    run = RunConfig.model_validate(
        {
            "model": _MODEL,
            "seed": seed,
            "loss": {"alpha_end": 0.5} | loss,
            "data": {"scenes": {"count": 2000, "eval_count": count}},
            "train": {"steps": 10, "global_batch_size": 16},
            "teacher": {"steps": 3 if teacher else 0},
        }
    )
    trained = train_wordpiece(training_source(run, None).captions(400), 300)
    for number, place in enumerate([folder, *([folder / "teacher"] if teacher else [])]):
        place.mkdir(parents=True)
        torch.manual_seed(seed + 100 * number)
        tokenizer = Tokenizer(trained, run.model.max_tokens)
        tokenizer.save(place / TOKENIZER)
        run.save(place / CONFIG)
        save_weights(SaclModel(run.model, tokenizer.size, pretrained=False).state_dict(), place, run.train.steps)
    return folder
