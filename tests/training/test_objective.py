"""The objective can be learned: each term by itself goes to near nothing on a handful of pairs."""

import pytest
import tiny
import torch

from sacl_ds.data.batch import take
from sacl_ds.training.objective import Targets


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
        if len(seen) >= 10 and sum(seen[-10:]) / 10 < 0.15 * seen[0]:
            return
    pytest.fail(f"{name} went from {seen[0]:.3f} to {seen[-1]:.3f}")


def test_the_gradient_of_what_is_taken_more_than_once_has_the_same_bits_every_time() -> None:
    """Large enough for several threads, on which the gradient of an index with repeats depends on their order."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(64, 24, 96, generator=generator)
    places = torch.randint(0, 8, (192,), generator=generator)
    weights = torch.randn(192, 24, 96, generator=generator)
    gradients = []
    for _ in range(10):
        leaf = states.clone().requires_grad_()
        taken = take(leaf, places)
        assert torch.equal(taken, states[places])
        (taken * weights).sum().backward()
        gradients.append(leaf.grad)
    expected = torch.zeros_like(states, dtype=torch.float64).index_add_(0, places, weights.double())
    torch.testing.assert_close(gradients[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])
