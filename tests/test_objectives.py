"""The objective can be learned: each term by itself goes to near nothing on a handful of pairs."""

import pytest
import tiny
import torch

from sacl_ds.training.objectives import Targets


@pytest.mark.parametrize("term", ["contrastive", "matching", "mlm"])
def test_each_term_can_be_learned_by_heart(term: str) -> None:
    weights = {f"{name}_weight": float(name == term) for name in ("contrastive", "matching", "mlm")}
    objective = tiny.objective(tiny.config(contrastive="infonce", **weights))
    batch, _ = tiny.batch(6)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    name = {"contrastive": "itc", "matching": "itm", "mlm": "mlm"}[term]
    seen = []
    for _ in range(300):
        losses = objective(batch, Targets(None, 0.0, generator))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(losses[name].item())
    assert sum(seen[-10:]) / 10 < 0.15 * seen[0]
