"""Very small pre-trained models, questions and answers, for tests of VQA."""

from __future__ import annotations

from types import SimpleNamespace

import tiny
import torch
from torch import Tensor

from sacl_ds.config import RunConfig
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.vqa.batch import QuestionBatch

PLACEMENTS = {
    "none": None,
    "output": {"placement": "output", "keep_rate": 0.5},
    "tower": {"placement": "tower", "layers": [1, 2], "keep_rate": 0.5},
    "published": {"placement": "published", "layers": [1], "keep_rate": 0.5},
}


def pretrained(run: RunConfig) -> SaclModel:
    torch.manual_seed(0)
    model = SaclModel(run.model, tiny.VOCABULARY, pretrained=False)
    return tiny.varied(model)  # type: ignore[return-value]


def ragged(rows: int, longest: int, seed: int) -> tuple[Tensor, Tensor]:
    """(ids, mask): [CLS]-like 1 first, random words, [SEP]-like 2 last, padding 0."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (rows,), generator=g)
    lengths[0] = longest
    places = torch.arange(longest)[None, :]
    ids = torch.randint(5, tiny.VOCABULARY, (rows, longest), generator=g)
    ids[:, 0] = 1
    ids[places == lengths[:, None] - 1] = 2
    mask = (places < lengths[:, None]).long()
    return ids * mask, mask


def questions(count: int, seed: int = 3) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)
    ids, mask = ragged(count, 7, seed)
    return SimpleNamespace(
        images=torch.randint(0, 256, (count, 3, 32, 32), generator=g, dtype=torch.uint8), ids=ids, mask=mask
    )


def batch_of(count: int, seed: int = 2) -> QuestionBatch:
    asked = questions(count, seed)
    rows = torch.arange(count).repeat_interleave(2)[1:]  # the first has one answer, the others two
    answers, mask = ragged(len(rows), 5, seed)
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed))
    keys = [str(number) for number in range(count)]
    return QuestionBatch(
        keys, asked.images, asked.ids, asked.mask, answers, mask, weights, rows, torch.arange(count)[:, None]
    )
