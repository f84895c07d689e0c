"""The gradient of the whole batch in one process, and what it is compared with."""

from functools import cache

import tiny
import torch

from sacl_ds.training.objective import Targets

PAIRS = 8


LOSSES = {
    "sacl": {"contrastive": "sacl", "sharpness": 5.0},
    "infonce": {"contrastive": "infonce"},
    "sacl, triton": {"contrastive": "sacl", "sharpness": 5.0, "backend": "triton"},
    "sacl, patches": {
        "selection": {"placement": "tower", "layers": [1, 2], "keep_rate": 0.5},
        "contrastive": "sacl",
        "sharpness": 5.0,
    },
}


def targets(teacher, dtype: torch.dtype = torch.float64) -> Targets:
    return Targets((teacher[0].to(dtype), teacher[1].to(dtype)), 0.6, None)


@cache
def whole_batch_gradient(loss: str, world: int) -> dict[str, torch.Tensor]:
    """One process, float64: ITC (dense) and MLM over the whole batch; ITM, whose negatives are a rank's own, block by
    block."""
    options = LOSSES[loss] | {"backend": "reference"}
    whole, teacher = tiny.batch(PAIRS)
    block = PAIRS // world
    joint = tiny.objective(tiny.config(matching_weight=0.0, **options)).double()
    joint(whole, targets(teacher))["loss"].backward()
    gradient = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in joint.named_parameters()}
    if block == 2:  # two pairs: each has exactly one possible negative, so that ITM has nothing to draw
        settings = {"contrastive_weight": 0.0, "mlm_weight": 0.0, **options}
        for start in range(0, PAIRS, block):
            alone = tiny.objective(tiny.config(**settings)).double()
            alone(*block_of(whole, teacher, start, block))["itm"].backward()
            for name, p in alone.named_parameters():
                if p.grad is not None:
                    gradient[name] = gradient[name] + p.grad / world
    return gradient


def block_of(whole, teacher, start: int, block: int):
    part, part_teacher = tiny.rows(whole, teacher, start, start + block)
    return part, targets(part_teacher)


def assert_contract(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    total = torch.stack([g.double().norm() for g in expected.values()]).norm()
    assert total > 0
    for name, gradient in expected.items():
        base = max(gradient.double().norm(), 1e-4 * total)
        error = (got[name].double() - gradient.double()).norm() / base
        assert error < tolerance, f"{name}: {error:.2e}"
    for part in ("image_encoder", "text_encoder", "image_projection", "text_projection", "logit_scale"):
        norm = sum(g.norm() for name, g in expected.items() if part in name)
        assert norm > 0, f"{part} has no gradient at all"
