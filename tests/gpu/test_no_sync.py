"""A step's forward and backward pass do not wait for the GPU."""

from collections.abc import Iterator

import pytest
import tiny
import torch

from sacl_ds.training.objective import Targets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("selection", [None, {"placement": "tower", "layers": [1], "keep_rate": 0.5}])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_forward_and_backward(
    backend: str, selection: dict[str, object] | None, recompute: bool, no_sync: None
) -> None:
    device = torch.device("cuda")
    objective = tiny.objective(tiny.config(selection, sharpness=5.0, backend=backend)).to(device)
    objective.model.checkpoint_activations(recompute)
    batch, teacher = tiny.batch(8)
    batch = tiny.without_padding(batch).to(device)
    features = teacher[0].float().to(device), teacher[1].float().to(device)
    targets = Targets(features, 0.5, torch.Generator(device).manual_seed(0))
    objective(batch, targets)["loss"].backward()  # kernels are built and tuned here, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    loss = objective(batch, targets)["loss"]
    loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
