"""Page docs/lab/presets.md: `python -m presets_page FILE` writes it; without FILE, stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sacl_ds.config import LossConfig, ModelConfig, PatchSelectionConfig
from sacl_ds.model.cost import Cost, ModelCost

_SIZES = (224, 256, 384)
_RERANKED = 16
_CASES: dict[str, dict[str, Any]] = {
    "none": {"placement": "none"},
    "tower": {"placement": "tower"},
    "tower, guide cls": {"placement": "tower", "guide": "cls"},
    "output": {"placement": "output"},
    "published": {"placement": "published"},
}


_PAGE = """# What the presets cost

Made by `python -m presets_page docs/lab/presets.md` (in `make docs`) from the configuration; do not edit.

Counted are matrix products, convolution and attention, 2 FLOPs a multiply-add, just as torch's FlopCounterMode counts
them (`sacl_ds/model/cost.py`, `tests/model/test_cost.py`). Captions are `model.max_tokens` long; MLM predicts
{predicted} % of them. Forward and backward are three times the forward FLOPs. *Kept* is what forward holds for
backward, for a pair, in float32 without dropout and without checkpointing, within 2 % of what autograd is seen to hold;
weights, gradients and the optimizer's state come on top.

* **pre-training**: a pair's share of a step: ITC, ITM with three pairings, MLM
* **one pairing**: one text that chooses from one image, as in VQA: inference is this, fine-tuning three times this
* **{texts} texts an image**: second stage of retrieval: the image once, {texts} texts, each matched with it

## Presets

{presets}

## base with patch selection

Layers {layers}, `keep_rate` {rate}. *of none*: of the same column without selection.

{variants}

## Its image encoder alone, with a text at hand

{towers}
"""


def page() -> str:
    """Return the text of docs/lab/presets.md."""
    selection = PatchSelectionConfig()
    return _PAGE.format(
        predicted=f"{100 * LossConfig().mlm_probability:g}",
        texts=_RERANKED,
        layers=" and ".join(map(str, selection.layers)),
        rate=f"{selection.keep_rate:g}",
        presets="\n".join(_presets()),
        variants="\n".join(_variants()),
        towers="\n".join(_towers()),
    )


def _presets() -> list[str]:
    names = ("tiny", "base")
    costs = [ModelCost(ModelConfig.model_validate({"preset": name})) for name in names]
    rows: list[tuple[str, list[str]]] = [
        ("image encoder", [cost.config.image_encoder for cost in costs]),
        ("its layers × width, patches", [_vit(cost) for cost in costs]),
        ("image size", [f"{cost.config.image_size} px" for cost in costs]),
        ("text + fusion layers × width", [_bert(cost.config) for cost in costs]),
        ("tokens a caption, vocabulary", [f"{cost.text_tokens}, {cost.config.vocab_size}" for cost in costs]),
    ]
    parameters = [cost.parameters() for cost in costs]
    rows += [
        (f"parameters: {part}", [f"{counts[part]:,}" for counts in parameters])
        for part in ("image", "text", "fusion", "heads", "all")
    ]
    uses = [(cost.pretraining(), cost.pairing(), cost.reranking(_RERANKED)) for cost in costs]
    for place, use in enumerate(("pre-training", "one pairing", f"{_RERANKED} texts an image")):
        rows.append((f"{use}, forward GFLOPs", [_giga(of[place]) for of in uses]))
    for place, use in enumerate(("pre-training", "one pairing")):
        rows.append((f"{use}, kept MB", [_mega(of[place]) for of in uses]))
    return _table(["", *names], [[name, *values] for name, values in rows], left=1)


def _variants() -> list[str]:
    rows = []
    for size in _SIZES:
        whole: list[float] = []
        for name, selection in _CASES.items():
            cost = _base(size, selection)
            uses = [cost.pretraining(), cost.pairing(), cost.reranking(_RERANKED)]
            whole = whole or [use.flops for use in uses]
            figures = [f"{_giga(use)} | {use.flops / of:.2f}" for use, of in zip(uses, whole, strict=True)]
            rows.append([str(size), name, *figures, _mega(uses[0]), _mega(uses[1])])
    head = ["px", "placement", "pre-training GFLOPs", "of none", "one pairing GFLOPs", "of none"]
    head += [f"{_RERANKED} texts GFLOPs", "of none", "pre-training kept MB", "one pairing kept MB"]
    return _table(head, rows, left=2)


def _towers() -> list[str]:
    rows = []
    for size in _SIZES:
        whole, tokens = _base(size, _CASES["none"]).image(guided=True)
        part, left = _base(size, _CASES["tower"]).image(guided=True)
        saved = f"{100 * (1 - part.flops / whole.flops):.1f} %"
        rows.append([str(size), f"{tokens}", f"{left}", _giga(whole), _giga(part), saved])
    head = ["px", "tokens", "left at the end", "GFLOPs of none", "GFLOPs of tower", "saved"]
    return _table(head, rows, left=0)


def _base(size: int, selection: dict[str, Any]) -> ModelCost:
    return ModelCost(ModelConfig.model_validate({"preset": "base", "image_size": size, "patch_selection": selection}))


def _vit(cost: ModelCost) -> str:
    vit = cost.model.image_encoder.vit
    return f"{len(vit.blocks)} × {vit.embed_dim}, {cost.patches} of {vit.patch_embed.patch_size[0]} px"


def _bert(config: ModelConfig) -> str:
    return f"{config.text_layers} + {config.fusion_layers} × {config.text_width}"


def _giga(cost: Cost) -> str:
    return f"{cost.flops / 1e9:.3g}" if cost.flops < 1e11 else f"{cost.flops / 1e9:.0f}"


def _mega(cost: Cost) -> str:
    return f"{cost.bytes / 1e6:.3g}" if cost.bytes < 1e9 else f"{cost.bytes / 1e6:.0f}"


def _table(head: list[str], rows: list[list[str]], left: int) -> list[str]:
    """Format a Markdown table. left: columns that are not numbers."""
    columns = len(head)
    marks = ["---" if place < left else "---:" for place in range(columns)]
    return [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page())
    else:
        print(page(), end="")
