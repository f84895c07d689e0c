"""A small model, its view, and sets of images and scenes to retrieve from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image

from sacl_ds.data.batch import View
from sacl_ds.data.pictures import Picture
from sacl_ds.data.scenes import Scenes, SceneSource
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.evaluation.rounds import RetrievalSet
from sacl_ds.model.sacl import SaclModel

CPU = torch.device("cpu")
SCENES = Scenes(37, 3)


def view(captions: list[str] | None = None) -> View:
    said = captions or [caption for index in range(len(SCENES)) for caption in SCENES[index].captions]
    return View(CanonicalView(32), Tokenizer(train_wordpiece(said, 200), 12))


def model(seen: View, selection: dict[str, object] | None = None, dtype: torch.dtype = torch.float64) -> SaclModel:
    """With every parameter moved, so that its scores differ."""
    torch.manual_seed(0)
    made = SaclModel(tiny.config(selection).model, seen.tokenizer.size, pretrained=False)  # type: ignore[attr-defined]
    return tiny.varied(made).to(dtype)  # type: ignore[return-value]


def scenes(count: int = len(SCENES)) -> RetrievalSet:
    holds = SCENES.relevance()[: count * SCENES.captions_per_scene, :count] == 1
    return RetrievalSet(SceneSource(SCENES), count, holds)


def by_hand(made: SaclModel, seen: View, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(captions, images) cosines and ITM logit differences of the first scenes: a plain loop, nothing shared."""
    pixels = [torch.from_numpy(SCENES.image(index)).permute(2, 0, 1) for index in range(count)]
    images = [seen.image(Picture(each), ())[None] for each in pixels]
    captions = [caption for index in range(count) for caption in SCENES[index].captions]
    rows = [torch.tensor([ids]) for ids in seen.tokenizer.ids(captions)]
    cosines, matches = np.zeros((2, len(captions), count))
    with torch.no_grad():
        texts = [made.encode_text(row, torch.ones_like(row)) for row in rows]
        for column, image in enumerate(images):
            states, feature = made.encode_image(image)
            for line, (tokens, unit) in enumerate(texts):
                cosines[line, column] = float(feature @ unit.T)
                fused = made.fuse(tokens, torch.ones(1, tokens.shape[1]), made.image_tokens(states, tokens[:, 0]))
                none, match = made.match_logits(fused)[0].tolist()
                matches[line, column] = match - none
    return cosines, matches


def full_order(first: np.ndarray, second: np.ndarray | None = None, k: int = 0) -> np.ndarray:
    """(q, m) scores -> (q, m) candidates: the k best of the first by the second, then the others; stable."""
    orders = []
    for row, scores in enumerate(first):
        order = sorted(range(len(scores)), key=lambda j: -scores[j])
        if second is not None:
            order[:k] = sorted(order[:k], key=lambda j: -second[row, j])
        orders.append(order)
    return np.array(orders)


def karpathy(folder: Path, images: int, split: str = "test", per_image: int = 2) -> Path:
    """Image files under images/ and the JSON that names them."""
    entries = []
    (folder / "images/val2014").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 36 + number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"images/val2014/{number}.png")
        said = [{"raw": f" a red thing {number} {i} ", "sentid": 10 * number + i} for i in range(per_image)]
        where = {"filename": f"{number}.png", "filepath": "val2014", "split": split, "cocoid": 100 + number}
        entries.append(where | {"imgid": number, "sentences": said})
    (folder / "k.json").write_text(json.dumps({"images": entries}))
    return folder / "k.json"
