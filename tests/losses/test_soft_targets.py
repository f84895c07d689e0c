"""Soft targets of the momentum model: the streaming form against the dense one, and what the dense one must be."""

import pytest
import torch
from loss_cases import OPTIONS, assert_agree, features, ids_of, loss_and_gradients

from sacl_ds.losses import Keys, masked_language_loss, similarity_regulated_loss, tiles

N, WIDTH = 21, 7


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", (8, 16))


def found(
    backend: str, dtype: torch.dtype, *, queue: int, ids: int, scale: float = 14.0, kind: str = "free", **options
):
    """Loss, losses and gradients with keys; options: also regulate_queue."""
    pairs, momentum, earlier = features(N, WIDTH, 1, kind=kind), features(N, WIDTH, 2), features(queue, WIDTH, 3)
    numbers = ids_of(N + queue, ids)
    keys = Keys(
        momentum[0].to(dtype),
        momentum[1].to(dtype),
        *([x.to(dtype) for x in earlier] if queue else [None] * 4),
        queue_ids=numbers[N:] if numbers is not None and queue else None,
        regulate_queue=options.pop("regulate_queue", True),
    )
    own = None if numbers is None else numbers[:N]
    return loss_and_gradients(backend, pairs, scale, own, dtype, keys, **options)


@pytest.mark.parametrize("soft_weight", [0.3, 1.0])
@pytest.mark.parametrize("regulate_queue", [True, False])
@pytest.mark.parametrize("ids", [0, 1, 2])
@pytest.mark.parametrize("queue", [0, 29])
@pytest.mark.parametrize("name", ["infonce", "sharp", "teacher", "teacher alone", "mass", "dropped"])
def test_streaming_is_dense(name: str, queue: int, ids: int, regulate_queue: bool, soft_weight: float) -> None:
    options = {"queue": queue, "ids": ids, "regulate_queue": regulate_queue, "soft_weight": soft_weight}
    got = found("streaming", torch.float64, **options, **OPTIONS[name])
    assert_agree(got, found("reference", torch.float64, **options, **OPTIONS[name]), 1e-12)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("kind", ["free", "mixed"])
@pytest.mark.parametrize("backend", ["reference", "streaming", "triton"])
def test_float32_at_any_scale(backend: str, kind: str, scale: float) -> None:
    options = {"queue": 29, "ids": 1, "scale": scale, "kind": kind, "soft_weight": 0.4, **OPTIONS["teacher"]}
    assert_agree(found(backend, torch.float32, **options), found("reference", torch.float64, **options), 2e-5)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("queue", [0, 29])
def test_the_value_is_that_of_the_formula(backend: str, queue: int) -> None:
    """By loops over anchors and candidates, from the momentum model's softmax to the cross-entropy."""
    pairs, momentum, earlier = features(N, WIDTH, 1), features(N, WIDTH, 2), features(queue, WIDTH, 3)
    numbers = ids_of(N + queue, 2)
    _, of_images, of_texts, _ = found(backend, torch.float64, queue=queue, ids=2, soft_weight=1.0)
    for got, mine, believed, theirs in ((of_images, 0, 0, 1), (of_texts, 1, 1, 0)):
        keys = torch.cat([momentum[theirs], earlier[theirs]])
        for i in range(N):
            others = [j for j in range(N + queue) if not (numbers[i] == numbers[j]).any()]
            candidates = [i, *others]
            z = torch.stack([14.0 * pairs[mine][i] @ keys[j] for j in candidates])
            z_momentum = torch.stack([14.0 * momentum[believed][i] @ keys[j] for j in candidates])
            q = z_momentum.exp() / z_momentum.exp().sum()
            p = z.exp() / z.exp().sum()
            assert got[i].item() == pytest.approx(-(q * p.log()).sum().item(), rel=1e-12)


def test_no_soft_targets_is_the_loss_as_it_was() -> None:
    for backend in ("reference", "streaming", "triton"):
        dtype = torch.float32 if backend == "triton" else torch.float64
        options = {"queue": 29, "ids": 1, **OPTIONS["teacher"]}
        without, none = found(backend, dtype, **options), found(backend, dtype, soft_weight=0.0, **options)
        for a, b in zip((*without[:3], *without[3]), (*none[:3], *none[3]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_nothing_is_pulled_where_the_model_agrees_with_its_average(backend: str) -> None:
    """z = z_m is a fixed point of the soft part; with regulated targets it would not be one."""
    pairs, earlier = features(N, WIDTH, 1), features(29, WIDTH, 3)
    keys = Keys(*pairs[:2], *earlier)
    *_, gradients = loss_and_gradients(backend, pairs, 14.0, None, torch.float64, keys, sharpness=5.0, soft_weight=1.0)
    for gradient in gradients[:2]:
        assert gradient.abs().max() < 1e-15
    *_, gradients = loss_and_gradients(backend, pairs, 14.0, None, torch.float64, keys, sharpness=5.0, soft_weight=0.5)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_anchors_without_negatives(backend: str) -> None:
    pairs, momentum = features(5, WIDTH, 1), features(5, WIDTH, 2)
    same = torch.zeros(5, dtype=torch.int64)
    keys = Keys(momentum[0], momentum[1])
    got = loss_and_gradients(backend, pairs, 14.0, same, torch.float64, keys, sharpness=5.0, soft_weight=0.5)
    for value in (*got[:3], *got[3]):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)


def test_statistics_with_keys_are_those_without() -> None:
    pairs = features(N, WIDTH, 1)
    arguments = {"alpha": 0.5, "sharpness": 4.0, "statistics": True}
    plain = similarity_regulated_loss(*pairs[:2], torch.tensor(14.0), *pairs[2:], **arguments)
    keys = Keys(*features(N, WIDTH, 2)[:2])
    for backend in ("reference", "streaming"):
        out = similarity_regulated_loss(
            *pairs[:2], torch.tensor(14.0), *pairs[2:], keys=keys, soft_weight=0.4, backend=backend, **arguments
        )
        assert out.loss != plain.loss
        for name, figure in plain.statistics.items():
            torch.testing.assert_close(out.statistics[name], figure, rtol=1e-12, atol=0)


def test_soft_targets_of_masked_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    soft = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (6,), generator=generator)
    loss = masked_language_loss(logits, labels, None, soft, 0.4)
    loss.backward()
    hot = torch.nn.functional.one_hot(labels, 9).double()
    target = 0.6 * hot + 0.4 * soft.exp() / soft.exp().sum(1, keepdim=True)
    p = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
    assert loss.item() == pytest.approx(-(target * p.log()).sum(1).mean().item(), rel=1e-12)
    torch.testing.assert_close(logits.grad, (p - target) / 6, rtol=1e-10, atol=1e-14)
