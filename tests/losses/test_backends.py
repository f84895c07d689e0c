"""Every backend of the contrastive loss against the dense reference in float64: losses and all gradients."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from dropped import kept_negatives, same_pairs
from loss_cases import OPTIONS, assert_agree, features, ids_of, loss_and_gradients

from sacl_ds.losses import Keys, Regulation, similarity_regulated_loss, tiles

IDS = {"none": 0, "column": 1, "columns": 2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few dozen pairs make several tiles, some of them cut off."""
    monkeypatch.setattr(tiles, "TILE", (8, 16))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 37])
@pytest.mark.parametrize(("name", "ids"), list(product(OPTIONS, IDS)))
def test_streaming_in_float64(name: str, ids: str, n: int) -> None:
    pairs, numbers = features(n, 7, n), ids_of(n, IDS[ids])
    got = loss_and_gradients("streaming", pairs, 14.0, numbers, torch.float64, **OPTIONS[name])
    expected = loss_and_gradients("reference", pairs, 14.0, numbers, torch.float64, **OPTIONS[name])
    assert_agree(got, expected, 1e-12)


@pytest.mark.parametrize("kind", ["near 0", "near 1", "mixed"])
@pytest.mark.parametrize(
    ("name", "scale"), list(product(["infonce", "sharp", "teacher", "dropped"], [1.0, 14.0, 100.0]))
)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("streaming", torch.float64, 1e-12),
        ("streaming", torch.float32, 1e-5),
        ("streaming", torch.bfloat16, 1e-2),
        ("triton", torch.float32, 1e-5),
        ("triton", torch.bfloat16, 1e-2),
    ],
)
def test_the_whole_range(
    backend: str, dtype: torch.dtype, tolerance: float, name: str, scale: float, kind: str
) -> None:
    """Up to the largest scale, where a row's exponents span 200; against float64 on the same rounded features.

    Rounding a cosine to float32 moves an exponent by up to scale * 6e-8: at 100, three times the tolerance.
    """
    pairs = [x.to(dtype).double() for x in features(37, 12, 3, kind=kind)]
    options = OPTIONS[name]
    got = loss_and_gradients(backend, pairs, scale, None, dtype, **options)
    expected = loss_and_gradients("reference", pairs, scale, None, torch.float64, **options)
    assert_agree(got, expected, 3 * tolerance if scale == 100 and dtype == torch.float32 else tolerance)


@pytest.mark.parametrize(("name", "ids"), [*product(OPTIONS, ["columns"]), *product(["sharp", "teacher"], IDS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton(name: str, ids: str, dtype: torch.dtype) -> None:
    pairs = [x.to(dtype).double() for x in features(45, 33, 5, d_teacher=70)]
    numbers = ids_of(45, IDS[ids])
    got = loss_and_gradients("triton", pairs, 14.0, numbers, dtype, **OPTIONS[name])
    expected = loss_and_gradients("reference", pairs, 14.0, numbers, torch.float64, **OPTIONS[name])
    assert_agree(got, expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 257])
@pytest.mark.parametrize("d", [1, 64, 100, 1024])
def test_triton_shapes(n: int, d: int) -> None:
    """Around one tile of 128, and widths that are no power of two."""
    pairs = features(n, d, n)
    got = loss_and_gradients("triton", [x.float() for x in pairs], 14.0, None, torch.float32, **OPTIONS["teacher"])
    expected = loss_and_gradients(
        "reference", [x.float().double() for x in pairs], 14.0, None, torch.float64, **OPTIONS["teacher"]
    )
    assert_agree(got, expected, 1e-5)


def test_triton_is_reproducible_to_the_bit() -> None:
    pairs = features(150, 20, 1)
    first, again = (
        loss_and_gradients("triton", pairs, 14.0, None, torch.float32, **OPTIONS["teacher"]) for _ in range(2)
    )
    for a, b in zip((*first[:3], *first[3]), (*again[:3], *again[3]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "streaming", "triton"])
def test_a_small_loss_keeps_its_digits_in_float32(backend: str) -> None:
    """Losses near 1e-5, of pairs that lie apart by 11.5 + log(n - 1) in the logits."""
    n = 40
    image = torch.eye(n)
    scale = math.log(n - 1) + 11.5
    loss, *_ = loss_and_gradients(backend, [image, image], scale, None, torch.float32, sharpness=0.0)
    assert loss.item() == pytest.approx(math.log1p((n - 1) * math.exp(-scale)), rel=1e-3)
    assert 0.9e-5 < loss.item() < 1.1e-5


@pytest.mark.parametrize("regulate_queue", [True, False])
@pytest.mark.parametrize("ids", ["none", "columns"])
@pytest.mark.parametrize("queue", [0, 29])
@pytest.mark.parametrize("name", ["infonce", "sharp", "teacher", "teacher alone", "mass", "dropped"])
@pytest.mark.parametrize(("backend", "dtype"), [("streaming", torch.float64), ("triton", torch.float32)])
def test_keys(backend: str, dtype: torch.dtype, name: str, queue: int, ids: str, regulate_queue: bool) -> None:
    """Momentum features and a queue, regulated or not."""
    n = 21
    pairs, momentum, earlier = features(n, 7, 1), features(n, 7, 2), features(queue, 7, 3)
    numbers = ids_of(n + queue, IDS[ids])
    options = OPTIONS[name]

    def run(backend: str, dtype: torch.dtype):
        cast = [x.to(dtype) for x in earlier] if queue else [None] * 4
        keys = Keys(
            momentum[0].to(dtype),
            momentum[1].to(dtype),
            *cast,
            queue_ids=numbers[n:] if numbers is not None and queue else None,
            regulate_queue=regulate_queue,
        )
        return loss_and_gradients(
            backend, pairs, 14.0, None if numbers is None else numbers[:n], dtype, keys, **options
        )

    assert_agree(run(backend, dtype), run("reference", torch.float64), 1e-12 if dtype == torch.float64 else 1e-5)


def test_keys_equal_to_the_features_are_the_loss_without_keys() -> None:
    """Losses; gradients differ, since keys carry none."""
    pairs = features(19, 6, 0)
    with_keys = loss_and_gradients(
        "reference", pairs, 14.0, None, torch.float64, Keys(pairs[0], pairs[1]), sharpness=5.0
    )
    without = loss_and_gradients("reference", pairs, 14.0, None, torch.float64, sharpness=5.0)
    for a, b in zip(with_keys[:3], without[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", ["streaming", "triton"])
def test_statistics_do_not_depend_on_the_backend(backend: str) -> None:
    pairs = [x.float() for x in features(37, 7, 8)]
    scale = torch.tensor(14.0)
    figures = [
        similarity_regulated_loss(
            *pairs[:2], scale, *pairs[2:], alpha=0.5, sharpness=4.0, drop_below=0.9, statistics=True, backend=b
        ).statistics
        for b in (backend, "reference")
    ]
    assert figures[0].keys() == figures[1].keys()
    for name, value in figures[1].items():
        assert figures[0][name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", ["sharp", "dropped", "infonce, dropped"])
@pytest.mark.parametrize("queue", [None, 0, 29])
@pytest.mark.parametrize("backend", ["reference", "streaming", "triton"])
def test_the_least_that_is_kept(backend: str, queue: int | None, name: str) -> None:
    """Of the negative that drop_below just keeps, from the weights of the whole batch and queue in numpy."""
    n, options, m = 21, OPTIONS[name], queue or 0
    dtype = torch.float32 if backend == "triton" else torch.float64
    pairs, momentum, earlier = ([x.to(dtype) for x in features(*shape)] for shape in ((n, 7, 1), (n, 7, 2), (m, 7, 3)))
    ids, keys = ids_of(n + m, 2), None
    if queue is not None:
        keys = Keys(*momentum[:2], *(earlier if queue else [None] * 4), queue_ids=ids[n:] if queue else None)
    out = similarity_regulated_loss(
        *pairs[:2], torch.tensor(14.0), *pairs[2:], pair_ids=ids[:n], backend=backend, keys=keys, **options
    )
    if "drop_below" not in options:
        assert out.least_kept is None
        return
    regulation = Regulation(**options, teacher_sharpness=options["sharpness"])
    compared = pairs[:2] if keys is None else momentum[:2]
    for bounds, anchor, key in zip(out.least_kept, (0, 1), (1, 0), strict=True):
        assert (bounds.shape, bounds.dtype) == ((n,), torch.float64)
        columns = torch.cat([compared[key], earlier[key]])
        teacher = pairs[2 + anchor], torch.cat([pairs[2 + key], earlier[2 + key]])
        expected = kept_negatives(pairs[anchor], columns, teacher, same_pairs(ids, n, m), regulation).least
        np.testing.assert_allclose(bounds.numpy(), expected, rtol=0, atol=1e-5 if backend == "triton" else 1e-12)


def test_what_does_not_fit_is_said() -> None:
    v = torch.eye(4)
    scale = torch.tensor(10.0)
    with pytest.raises(ValueError, match="choose one of auto, reference, streaming, triton"):
        similarity_regulated_loss(v, v, scale, backend="cuda")
    with pytest.raises(ValueError, match="no float64"):
        similarity_regulated_loss(v.double(), v.double(), scale, backend="triton")
    with pytest.raises(ValueError, match="keys must be"):
        similarity_regulated_loss(v, v, scale, keys=Keys(v[:2], v[:2]))
    with pytest.raises(ValueError, match="queue_teacher_image"):
        similarity_regulated_loss(v, v, scale, v, v, alpha=0.5, keys=Keys(v, v, v, v))
    with pytest.raises(ValueError, match=r"soft_weight=1\.5"):
        similarity_regulated_loss(v, v, scale, keys=Keys(v, v), soft_weight=1.5)
