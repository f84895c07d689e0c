"""Every loss once, forward and backward, with torch alone: run as a script, it blocks all other packages first.

python losses_alone.py '["torch", ...]' BACKEND     prints a JSON list of numbers
"""

from __future__ import annotations

import importlib.abc
import json
import sys


class Blocker(importlib.abc.MetaPathFinder):
    """Lets the standard library, sacl_ds and the packages named be imported, and nothing else."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = {*allowed, "sacl_ds", *sys.stdlib_module_names}

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".", maxsplit=1)[0] not in self.allowed:
            raise ModuleNotFoundError(f"No module named {name!r}: it is blocked", name=name)


def found(backend: str) -> list[float]:
    """Losses and sums of gradients."""
    import torch
    from torch.nn.functional import normalize

    from sacl_ds import losses

    generator = torch.Generator().manual_seed(0)
    image, text, t_image, t_text, m_image, m_text = normalize(torch.randn(6, 9, 5, generator=generator), dim=2)
    queue = normalize(torch.randn(4, 7, 5, generator=generator), dim=2)
    ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7, 8])
    keys = losses.Keys(m_image, m_text, *queue, queue_ids=torch.arange(5, 12))
    regulation = losses.Regulation(0.4, 3.0, 5.0, 1.0, 0.7)
    settings = {"alpha": 0.4, "sharpness": 3.0, "teacher_sharpness": 5.0}
    numbers = []
    for more in ({}, {"drop_below": 0.7}, {"keys": keys, "soft_weight": 0.3}, {"keys": keys, "drop_below": 0.7}):
        v, t, scale = (x.clone().requires_grad_() for x in (image, text, torch.tensor(14.0)))
        out = losses.similarity_regulated_loss(
            v, t, scale, t_image, t_text, pair_ids=ids, backend=backend, statistics=True, **settings, **more
        )
        out.loss.backward()
        numbers += [out.loss, *(x.grad.double().norm() for x in (v, t, scale)), *out.statistics.values()]
    module = losses.SimilarityRegulatedLoss(backend=backend, **settings)
    numbers.append(module(image, text, torch.tensor(14.0), t_image, t_text, ids))
    weighting = losses.Weighting(regulation, (t_image, t_text), out.least_kept, (m_image, m_text))
    drawn = losses.hard_negatives(image, text, scale.detach(), ids, weighting=weighting, generator=generator)
    numbers += [drawn.valid.sum(), (drawn.text * drawn.text_found).sum()]
    logits = torch.randn(9, 2, generator=generator)
    numbers.append(losses.matching_loss(logits, ids < 4, ids > 0))
    numbers.append(losses.masked_language_loss(logits, ids % 2, soft=-logits, soft_weight=0.3))
    numbers.append(losses.regulation_weights(logits.exp(), logits > 0).sum())
    return [number.item() for number in numbers]


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker(json.loads(sys.argv[1])))
    print(json.dumps(found(sys.argv[2])))
    assert not {"numpy", "deepspeed", "pydantic"} & set(sys.modules)
