"""The Triton kernels compiled for a GPU: equal to the dense form in float64, reproducible, and in little memory."""

import pytest
import torch
from torch.nn.functional import normalize

from sacl_ds.losses import similarity_regulated_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
OPTIONS = {
    "infonce": {"sharpness": 0.0},
    "sharp": {"sharpness": 5.0},
    "teacher": {"alpha": 0.6, "sharpness": 4.0},
    "teacher alone": {"alpha": 1.0, "sharpness": 4.0},
    "dropped": {"alpha": 0.5, "sharpness": 5.0, "drop_below": 0.9},
}


def run(backend: str, dtype: torch.dtype, n: int, d: int, scale: float, options: dict) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    source = [normalize(torch.randn(n, d, generator=generator, device="cuda"), dim=1) for _ in range(4)]
    rounded = [x.to(torch.bfloat16) if dtype == torch.bfloat16 else x for x in source]
    image, text, *teacher = (x.to(torch.float64 if backend == "reference" else dtype) for x in rounded)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(scale, device="cuda", requires_grad=True)]
    teacher = teacher if options.get("alpha") else [None, None]
    ids = torch.arange(n, device="cuda") // 2 % (n // 3 + 1)
    loss = similarity_regulated_loss(*leaves, *teacher, pair_ids=ids, backend=backend, **options).loss
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize(("n", "d"), [(2, 8), (127, 64), (129, 100), (1000, 512), (257, 1024)])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equals_the_dense_form(dtype: torch.dtype, tolerance: float, name: str, n: int, d: int, scale: float) -> None:
    got = run("triton", dtype, n, d, scale, OPTIONS[name])
    expected = run("reference", dtype, n, d, scale, OPTIONS[name])
    wide = 3 if scale == 100 and dtype == torch.float32 else 1
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert (a.double() - b.double()).abs().max() <= wide * tolerance * b.abs().max().clamp(min=1e-12)
    assert abs(got[3].item() - expected[3].item()) <= wide * tolerance


def test_the_same_bits_every_time() -> None:
    first, again = (run("triton", torch.bfloat16, 3000, 512, 14.0, OPTIONS["teacher"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_memory() -> None:
    """N = 32768 of width 512, teacher included, in under 200 MB besides the features."""
    generator = torch.Generator("cuda").manual_seed(0)
    features = [
        normalize(torch.randn(32768, 512, generator=generator, device="cuda"), dim=1).bfloat16() for _ in range(4)
    ]
    image, text = (x.requires_grad_() for x in features[:2])
    scale = torch.tensor(14.0, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    similarity_regulated_loss(image, text, scale, *features[2:], alpha=0.5, sharpness=3.0).loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 200e6
