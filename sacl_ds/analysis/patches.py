"""Patches that a model keeps of a picture for a text, and a figure of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from torch import Tensor

from sacl_ds.analysis.subject import folder_of, load_trained
from sacl_ds.config_file import load_config
from sacl_ds.data.text import Tokenizer, attention_mask, pad
from sacl_ds.errors import UserError
from sacl_ds.model.patch_selection import Choice
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG

_DIMMED = 0.22  # of the brightness of a patch that is left out, on white
_ALONE = "#ff7f0e"
_PANEL = 1.75  # inches
_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class Looked:
    """Patches of a picture that one text keeps. pixels: (3, H, W) uint8, as the model sees it; choices: of one row."""

    caption: str
    pixels: Tensor
    choices: list[Choice]


def load_selecting(folder: Path, settings: Sequence[str]) -> tuple[SaclModel, Tokenizer]:
    """The model of a finished run, or of RUN/checkpoints/step_N, with other settings of its patch selection, which has
    no parameters, and its tokenizer.

    settings: name=value of model.patch_selection. Raises UserError, also where no patch is ever left out.
    """
    model, run, tokenizer, _ = load_trained(folder, "RUN")
    if settings:
        run = load_config(folder_of(folder) / CONFIG, [f"model.patch_selection.{setting}" for setting in settings])
        state = model.state_dict()
        model = SaclModel(run.model, tokenizer.size, pretrained=False)
        model.load_state_dict(state)
    if not model.image_encoder.layers:
        depth = len(model.image_encoder.vit.blocks)
        raise UserError(
            f"{folder} was trained without patch selection (placement=none); choose one to look at, e.g. --placement "
            f"tower --layers {max(1, depth // 2)}, of its {depth} layers"
        )
    return model.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def look(model: SaclModel, tokenizer: Tokenizer, pictures: Tensor, captions: Sequence[str]) -> list[Looked]:
    """Run caption i on picture i and record the patches kept. pictures: (n, 3, H, W) uint8, on the model's device."""
    ids = tokenizer.ids(captions)
    device = pictures.device
    rows = (torch.from_numpy(pad(ids, tokenizer.pad_id)), torch.from_numpy(attention_mask(ids)))
    states, _ = model.encode_text(*(row.to(device) for row in rows))
    record: list[Choice] = []
    model.image_encoder(pictures, states[:, 0], record)
    found = []
    for row, caption in enumerate(captions):
        choices = [Choice(c.layer, c.among[row].cpu(), c.scores[row].cpu(), c.places[row].cpu()) for c in record]
        found.append(Looked(caption, pictures[row].cpu(), choices))
    return found


def dimmed(pixels: Tensor, places: Tensor, patch: int) -> np.ndarray:
    """(3, H, W) uint8 -> (H, W, 3) in [0, 1], with all patches but those at `places` faded to white."""
    picture = pixels.permute(1, 2, 0).numpy() / 255.0
    kept = np.zeros((pixels.shape[1] // patch, pixels.shape[2] // patch), bool)
    kept.flat[places.numpy()] = True
    strength = np.where(kept, 1.0, _DIMMED).repeat(patch, 0).repeat(patch, 1)[..., None]
    return picture * strength + (1 - strength)


def draw(looked: Sequence[Sequence[Looked]], patch: int, title: str, path: Path) -> None:
    """Write a PNG. looked: for each picture what its captions keep, equally many for all."""
    layers = [choice.layer for choice in looked[0][0].choices]
    block = len(layers) + 1  # panels of a caption
    captions = len(looked[0])
    widths = [1.0, *([0.12, *[1.0] * block] * captions)]
    figure, axes = plt.subplots(
        len(looked), len(widths), squeeze=False, layout="constrained", gridspec_kw={"width_ratios": widths},
        figsize=(_PANEL * sum(widths) + 0.9, (_PANEL + 0.62) * len(looked) + 0.95),
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    even = [_relative(one.choices[0]) for row in looked for one in row]
    top = max(2.0, *(float(scores.max()) for scores in even))
    bottom = max(0.05, min(0.5, *(float(scores.min()) for scores in even)))
    norm = LogNorm(bottom, top, clip=True)
    for row, line in zip(looked, axes, strict=True):
        line[0].imshow(row[0].pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        line[0].set_title("\n\n\npicture", fontsize=7, color="#777777")  # room for a caption of two lines
        for number, one in enumerate(row):
            start = 2 + number * (block + 1)
            others = [other for place, other in enumerate(row) if place != number]
            for place, choice in enumerate(one.choices):
                axis = line[start + place]
                axis.imshow(dimmed(one.pixels, choice.places, patch), interpolation="nearest")
                alone = set(choice.places.tolist())
                for other in others:
                    alone -= set(other.choices[place].places.tolist())
                _frames(axis, sorted(alone) if others else [], one.pixels.shape[2] // patch, patch)
                patches = (one.pixels.shape[1] // patch) * (one.pixels.shape[2] // patch)
                axis.set_title(f"layer {choice.layer}: {len(choice.places)} of {patches}", fontsize=7, color="#777777")
            axis = line[start + len(layers)]
            heat = _relative(one.choices[0]).reshape(one.pixels.shape[1] // patch, -1)
            drawn = axis.imshow(heat, cmap="magma", norm=norm, interpolation="nearest")
            axis.set_title(f"scores, layer {layers[0]}", fontsize=7, color="#777777")
            said = "\n".join(textwrap.wrap(one.caption, 20 * block)[:2])
            text = line[start].annotate(
                said, (0, 1), (0, 16), xycoords="axes fraction", textcoords="offset points", fontsize=9, va="bottom",
                annotation_clip=False,
            )  # fmt: skip
            text.set_in_layout(False)  # it is as wide as all panels of the caption
    bar = figure.colorbar(drawn, ax=axes, shrink=min(0.9, 1.6 / len(looked) + 0.2), pad=0.01, aspect=25)
    bar.set_label("score, in units of an even share", fontsize=7)
    shown = [tick for tick in _TICKS if bottom <= tick <= top]
    bar.set_ticks(shown, labels=[f"{tick:g}" for tick in shown], minor=False)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    legend = [
        Line2D([], [], marker="s", linestyle="", markersize=9, color="#d9d9d9", label="pale: left out (fused into one)")
    ]
    if captions > 1:
        legend.append(
            Line2D([], [], marker="s", linestyle="", markersize=8, markerfacecolor="none", markeredgecolor=_ALONE,
                   markeredgewidth=1.6, label="kept for this caption alone")
        )  # fmt: skip
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _relative(choice: Choice) -> np.ndarray:
    """(patches,) scores of the first selection, 1 where all are equal."""
    return (choice.scores * len(choice.among)).numpy()


def _frames(axis: Axes, places: Sequence[int], columns: int, patch: int) -> None:
    for place in places:
        row, column = divmod(place, columns)
        corner = (column * patch - 0.5 + 0.03 * patch, row * patch - 0.5 + 0.03 * patch)
        axis.add_patch(plt.Rectangle(corner, 0.94 * patch, 0.94 * patch, fill=False, edgecolor=_ALONE, linewidth=1.4))
