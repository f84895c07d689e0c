"""Binding of colours to shapes: scenes against themselves with two colours exchanged."""

from __future__ import annotations

import numpy as np
import torch

from sacl_ds.data.batch import View
from sacl_ds.data.pictures import Picture
from sacl_ds.data.scene_language import COLOUR, SHAPE, UNSAID, Scene, phrase
from sacl_ds.data.scenes import Scenes, render
from sacl_ds.data.text import attention_mask, pad
from sacl_ds.model.sacl import SaclModel


def swapped_pairs(scenes: Scenes) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """List (caption, picture it is true of, the same picture with two colours exchanged, of which it is false).

    At most one a scene: 'a red circle' and the first two objects that differ in shape and in colour.
    """
    found = []
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        pair = _exchangeable(scene)
        if pair is None:
            continue
        first, second = pair
        objects = [list(thing) for thing in scene.objects]
        objects[first][COLOUR], objects[second][COLOUR] = objects[second][COLOUR], objects[first][COLOUR]
        thing = scene.objects[first]
        if any(other[SHAPE] == thing[SHAPE] and other[COLOUR] == thing[COLOUR] for other in objects):
            continue
        foil = Scene(tuple(tuple(other) for other in objects), scene.background)  # type: ignore[misc]
        said = tuple(value if i in (SHAPE, COLOUR) else UNSAID for i, value in enumerate(thing))
        entropy = (scenes.seed, index)
        found.append(
            (phrase(said), render(scene, scenes.image_size, entropy), render(foil, scenes.image_size, entropy))
        )
    return found


def _exchangeable(scene: Scene) -> tuple[int, int] | None:
    for first, thing in enumerate(scene.objects):
        for second, other in enumerate(scene.objects):
            if thing[SHAPE] != other[SHAPE] and thing[COLOUR] != other[COLOUR]:
                return first, second
    return None


@torch.no_grad()
def binding_accuracy(model: SaclModel, scenes: Scenes, view: View, device: torch.device) -> float:
    """Return the share of `swapped_pairs` whose caption is nearer to its own picture; chance is 0.5, NaN means no
    pairs."""
    pairs = swapped_pairs(scenes)
    if not pairs:
        return float("nan")
    captions, pictures, foils = zip(*pairs, strict=True)
    was_training = model.training
    model.eval()
    rows = view.tokenizer.ids(captions)
    ids = torch.from_numpy(pad(rows, view.tokenizer.pad_id)).to(device)
    text = model.encode_text(ids, torch.from_numpy(attention_mask(rows)).to(device))[1]
    right, wrong = (
        model.encode_image(torch.stack([_seen(pixels, view) for pixels in group]).to(device))[1]
        for group in (pictures, foils)
    )
    model.train(was_training)
    return float(((text * right).sum(1) > (text * wrong).sum(1)).float().mean())


def _seen(pixels: np.ndarray, view: View) -> torch.Tensor:
    return view.image(Picture(torch.from_numpy(pixels).permute(2, 0, 1)), ())
