"""The regulated loss against an independent numpy computation in float64, and the properties the paper asks for."""

import math

import numpy as np
import pytest
import torch
from documented import assert_documented
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import features
from scipy.special import logsumexp

from sacl_ds.losses import Keys, Regulation, regulation_weights, similarity_regulated_loss


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def independent_loss(v, t, scale, tv=None, tt=None, alpha=0.0, kappa=1.0, kappa_t=None, ids=None, mass=1.0, drop=None):
    """Eq. 4-9 anchor by anchor, negative by negative."""
    n = len(v)
    ids = np.arange(n)[:, None] if ids is None else ids.reshape(n, -1)
    kappa_t = kappa if kappa_t is None else kappa_t

    def direction(a, b, ta, tb):
        losses, weights_of = [], []
        for i in range(n):
            negatives = [j for j in range(n) if j != i and not (ids[i] == ids[j]).any()]
            similarity = []
            for j in negatives:
                s = (1 - alpha) * math.exp(kappa * float(a[i] @ b[j]))
                if alpha:
                    s += alpha * math.exp(kappa_t * float(ta[i] @ tb[j]))
                similarity.append(s)
            inverse = [1 / s for s in similarity]
            weights = [len(negatives) * x / sum(inverse) for x in inverse]
            if drop is not None:
                kept = [k for k, w in enumerate(weights) if w >= drop]
                negatives, weights = [negatives[k] for k in kept], [1.0] * len(kept)
            weights = [mass * w for w in weights]
            weights_of.append(dict(zip(negatives, weights, strict=True)))
            if not negatives:
                losses.append(0.0)
                continue
            own = scale * float(a[i] @ b[i])
            terms = [own] + [math.log(w) + scale * float(a[i] @ b[j]) for j, w in zip(negatives, weights, strict=True)]
            losses.append(float(logsumexp(terms)) - own)
        return np.array(losses), weights_of

    image, image_weights = direction(v, t, tv, tt)
    text, text_weights = direction(t, v, tt, tv)
    return image, text, image_weights, text_weights


CASES = {
    "paper": {},
    "sharp": {"sharpness": 7.0},
    "infonce": {"sharpness": 0.0},
    "teacher": {"alpha": 0.6, "sharpness": 4.0},
    "teacher only": {"alpha": 1.0, "sharpness": 4.0, "teacher_sharpness": 2.0},
    "two sharpnesses": {"alpha": 0.3, "sharpness": 4.0, "teacher_sharpness": 9.0},
    "mass": {"sharpness": 3.0, "negative_mass": 0.03},
    "dropped": {"sharpness": 5.0, "drop_below": 0.7},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_ids", ["none", "column", "columns"])
@pytest.mark.parametrize("n", [2, 5, 13])
def test_equals_independent_computation(name: str, with_ids: str, n: int) -> None:
    options = CASES[name]
    rng = np.random.default_rng(n)
    v, t, tv, tt = unit(rng, n, 6), unit(rng, n, 6), unit(rng, n, 4), unit(rng, n, 4)
    ids = {"none": None, "column": rng.integers(0, 4, n), "columns": rng.integers(0, 5, (n, 2))}[with_ids]
    teacher = options.get("alpha", 0) > 0
    out = similarity_regulated_loss(
        torch.from_numpy(v),
        torch.from_numpy(t),
        torch.tensor(14.0, dtype=torch.float64),
        torch.from_numpy(tv) if teacher else None,
        torch.from_numpy(tt) if teacher else None,
        pair_ids=None if ids is None else torch.from_numpy(ids),
        statistics=True,
        **options,
    )
    image, text, image_weights, text_weights = independent_loss(
        v, t, 14.0, tv, tt, options.get("alpha", 0.0), options.get("sharpness", 1.0), options.get("teacher_sharpness"),
        ids, options.get("negative_mass", 1.0), options.get("drop_below"),
    )  # fmt: skip
    np.testing.assert_allclose(out.image_to_text.numpy(), image, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(out.text_to_image.numpy(), text, rtol=1e-12, atol=1e-13)
    assert out.loss.item() == pytest.approx((image.mean() + text.mean()) / 2, rel=1e-12)
    check_statistics(out.statistics, v, t, 14.0, ids, image_weights, text_weights)


def check_statistics(statistics, v, t, scale, ids, image_weights, text_weights) -> None:
    """From their definitions, over all negatives: those that are removed have no weight here and count as 0."""
    n = len(v)
    ids = np.arange(n)[:, None] if ids is None else ids.reshape(n, -1)
    positive, negative, target, bound, mass, count = [], [], [], [], [], []
    for a, b, weights_of in ((v, t, image_weights), (t, v, text_weights)):
        for i, weights in enumerate(weights_of):
            every = [j for j in range(n) if j != i and not (ids[i] == ids[j]).any()]
            assert set(weights) <= set(every)
            z = {j: scale * float(a[i] @ b[j]) for j in [i, *every]}
            mean = (math.exp(z[i]) + sum(w * math.exp(z[j]) for j, w in weights.items())) / (1 + len(every))
            positive.append(z[i] - math.log(mean))
            negative += [z[j] + math.log(w) - math.log(mean) for j, w in weights.items()]
            target += [-math.log(w) for w in weights.values()]
            plain = math.log(sum(math.exp(x) for x in z.values())) - z[i]
            bound.append(math.log(1 + len(every)) - plain)
            count.append(len(every))
            if weights:
                regulated = sum(w * math.exp(z[j]) for j, w in weights.items())
                mass.append(math.log(regulated / sum(math.exp(z[j]) for j in every)))
    expected = {
        "pmi_positive": np.mean(positive),
        "pmi_negative": np.mean(negative) if negative else 0.0,
        "pmi_negative_target": np.mean(target) if target else 0.0,
        "infonce_bound": np.mean(bound),
        "negative_mass_log": np.mean(mass) if mass else 0.0,
        "negatives": np.mean(count),
    }
    for name, value in expected.items():
        assert statistics[name].item() == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_zero_sharpness_is_infonce() -> None:
    rng = np.random.default_rng(0)
    v, t = (torch.from_numpy(unit(rng, 9, 5)) for _ in range(2))
    logits = 20 * v @ t.T
    labels = torch.arange(9)
    expected = (
        torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    ) / 2
    out = similarity_regulated_loss(v, t, torch.tensor(20.0, dtype=torch.float64), sharpness=0.0)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)


def test_gradient_treats_weights_as_constants() -> None:
    """Against autograd through the same formula with the weights written in as numbers."""
    rng = np.random.default_rng(3)
    v, t = (torch.from_numpy(unit(rng, 7, 5)).requires_grad_() for _ in range(2))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    similarity_regulated_loss(v, t, scale, sharpness=4.0).loss.backward()
    c = (v @ t.T).detach()
    off = ~torch.eye(7, dtype=torch.bool)
    w_rows, w_columns = regulation_weights((4 * c).exp(), off), regulation_weights((4 * c.T).exp(), off)
    v2, t2 = (x.detach().clone().requires_grad_() for x in (v, t))
    scale2 = scale.detach().clone().requires_grad_()
    z = scale2 * v2 @ t2.T
    eye = torch.eye(7, dtype=torch.float64)
    rows = ((w_rows + eye) * z.exp()).sum(1).log() - z.diagonal()
    columns = ((w_columns + eye) * z.T.exp()).sum(1).log() - z.diagonal()
    ((rows.mean() + columns.mean()) / 2).backward()
    for ours, expected in ((v, v2), (t, t2), (scale, scale2)):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-10, atol=1e-14)


@given(st.integers(2, 12), st.integers(1, 9), st.floats(0.1, 20.0), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_weights_have_the_papers_properties(n: int, rows: int, sharpness: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cosine = torch.from_numpy(rng.uniform(-1, 1, (rows, n)))
    negatives = torch.from_numpy(rng.random((rows, n)) < 0.8)
    weights = regulation_weights((sharpness * cosine).exp(), negatives)
    assert (weights[~negatives] == 0).all()
    assert (weights[negatives] > 0).all()
    for w, c, mask in zip(weights, cosine, negatives, strict=True):
        if mask.sum() == 0:
            continue
        assert w[mask].mean().item() == pytest.approx(1.0, abs=1e-6)
        if mask.sum() > 1:
            order = c[mask].argsort()
            assert (w[mask][order].diff() < 0).all()
            assert np.cov(w[mask].numpy(), c[mask].numpy())[0, 1] < 0


@pytest.mark.parametrize("cosine", [0.0, 0.999, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safe_at_the_largest_scale(cosine: float | str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    if cosine == "mixed":
        v, t = unit(rng, 16, 3), unit(rng, 16, 3)
    else:
        base = unit(rng, 1, 64)
        v, t = (
            x / np.linalg.norm(x, axis=1, keepdims=True)
            for x in (base * cosine + 0.05 * unit(rng, 16, 64) for _ in "vt")
        )
    a, b = (torch.from_numpy(x).to(dtype) for x in (v, t))
    exact = similarity_regulated_loss(a.double(), b.double(), torch.tensor(100.0).double(), sharpness=5.0)
    a32, b32 = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = similarity_regulated_loss(a32, b32, torch.tensor(100.0), sharpness=5.0)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4)
    assert a32.grad.isfinite().all()
    assert b32.grad.isfinite().all()


def test_a_small_loss_keeps_its_digits_in_float32() -> None:
    v = torch.eye(4)
    scale = torch.tensor(12.6)
    out = similarity_regulated_loss(v, v, scale, sharpness=0.0)
    expected = math.log1p(3 * math.exp(-12.6))
    assert out.loss.item() == pytest.approx(expected, rel=1e-3)
    assert expected < 1.1e-5


def test_anchor_without_negatives_is_zero_with_zero_gradient() -> None:
    v, t = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    out = similarity_regulated_loss(
        v, t, torch.tensor(10.0), pair_ids=torch.zeros(3, dtype=torch.int64), statistics=True
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert (v.grad == 0).all()
    single = similarity_regulated_loss(v[:1], t[:1], torch.tensor(10.0))
    assert single.loss.item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5}, "needs teacher"),
        ({"alpha": 1.5}, r"\[0, 1\]"),
        ({"alpha": math.nan}, r"\[0, 1\]"),
        ({"sharpness": -1.0}, "negative"),
        ({"sharpness": math.inf}, "finite"),
        ({"sharpness": math.nan}, "finite"),
        ({"teacher_sharpness": math.inf}, "finite"),
        ({"negative_mass": 0.0}, "positive"),
        ({"negative_mass": math.nan}, "positive"),
        ({"negative_mass": math.inf}, "finite"),
        ({"drop_below": math.nan}, "positive"),
        ({"drop_below": math.inf}, "finite"),
        ({"backend": "fast"}, "choose one of"),
        ({"pair_ids": torch.zeros(3, dtype=torch.int64)}, "pair_ids"),
        ({"teacher_image": torch.randn(4, 2)}, "together"),
        ({"counts": [3]}, r"counts=\[3\] of 1 ranks, and this one holds 4"),
        ({"counts": [4, 4]}, "of 1 ranks"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_regulated_loss(torch.randn(4, 3), torch.randn(4, 3), torch.tensor(1.0), **options)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("scale", [0.0, torch.zeros(1), torch.zeros((), requires_grad=True), 14.0])
def test_a_scale_of_any_form_and_of_zero(scale: torch.Tensor | float, backend: str) -> None:
    """With every logit 0 the weights sum to their number: log n."""
    pairs = [x.float() for x in features(9, 5, 1)]
    out = similarity_regulated_loss(*pairs[:2], scale, *pairs[2:], alpha=0.4, sharpness=3.0, backend=backend)
    if scale == 14.0:
        exact = similarity_regulated_loss(*pairs[:2], torch.tensor(14.0), *pairs[2:], alpha=0.4, sharpness=3.0)
        assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)
    else:
        assert out.loss.item() == pytest.approx(math.log(9), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_no_pairs_and_several_scales_are_said(backend: str) -> None:
    for pairs, scale in ((torch.ones(0, 3), 14.0), (torch.eye(4), torch.ones(4))):
        with pytest.raises(ValueError, match=r"no pairs|one number") as caught:
            similarity_regulated_loss(pairs, pairs, scale, backend=backend)
        assert_documented(f"ValueError: {caught.value}")


def of_everything(backend: str, queue: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a loss is computed from, by name, and the loss; the scale and the pairs are differentiable."""
    image, text, t_image, t_text = features(5, 4, 0)
    held = {"image": image.requires_grad_(), "text": text.requires_grad_(), "teacher image": t_image}
    held |= {"teacher text": t_text, "scale": torch.tensor(9.0, dtype=torch.float64, requires_grad=True)}
    keys = None
    if queue:
        momentum, earlier = features(5, 4, 1)[:2], features(3, 4, 2)
        held |= {"key image": momentum[0], "key text": momentum[1], "queue image": earlier[0], "queue text": earlier[1]}
        held |= {"queue's teacher": earlier[2]}
        keys = Keys(*momentum, *earlier)
    out = similarity_regulated_loss(
        image, text, held["scale"], t_image, t_text, alpha=0.5, sharpness=3.0, keys=keys, backend=backend
    )
    return held, out.loss


@pytest.mark.parametrize("queue", [False, True])
def test_a_gradient_that_is_to_be_differentiated_again_is_refused(queue: bool) -> None:
    """A penalty on it would train nothing. The dense form, of plain operations, has its second derivative."""
    held, loss = of_everything("streaming", queue)
    with pytest.raises(RuntimeError, match="create_graph=True") as caught:
        torch.autograd.grad(loss, [held["image"]], create_graph=True)
    assert_documented(f"RuntimeError: {caught.value}")
    image, text = (x.requires_grad_() for x in features(4, 3, 0)[:2])

    def dense(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return similarity_regulated_loss(image, text, 5.0, sharpness=0.0, backend="reference").loss

    assert torch.autograd.gradgradcheck(dense, [image, text])


@pytest.mark.parametrize("name", [*of_everything("streaming", True)[0]])
@pytest.mark.parametrize("queue", [False, True])
def test_what_changes_between_forward_and_backward_is_noticed(queue: bool, name: str) -> None:
    held, loss = of_everything("streaming", queue)
    if name not in held:
        return
    with torch.no_grad():
        held[name].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_a_teacher_in_inference_mode(backend: str) -> None:
    image, text, *teacher = features(5, 4, 0)
    with torch.inference_mode():
        inferred = [2 * x / 2 for x in teacher]
    found = []
    for each in (teacher, inferred):
        leaf = image.clone().requires_grad_()
        similarity_regulated_loss(leaf, text, 9.0, *each, alpha=0.5, backend=backend).loss.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "settings", [{"alpha": 1.5}, {"sharpness": math.nan}, {"negative_mass": 0.0}, {"drop_below": 0.0}]
)
def test_settings_out_of_range_are_told(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must") as error:
        Regulation(**settings)
    assert_documented(f"ValueError: {error.value}")


@pytest.mark.parametrize("rest", [1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize("kappa", [12.0, 24.0, 60.0])
@pytest.mark.parametrize("backend", ["reference", "streaming", "triton"])
def test_the_student_counts_beside_a_teacher_of_nearly_all(backend: str, kappa: float, rest: float) -> None:
    """In float32, whose 1 - alpha is 0 for the smaller of these, against the equations in float64.

    The student sees alike what the teacher sees apart, so that its share decides most of the weights.
    """
    rng = np.random.default_rng(0)
    v = unit(rng, 1, 4) + 0.1 * unit(rng, 9, 4)
    v, tv = (
        x.astype(np.float32).astype(np.float64) for x in (v / np.linalg.norm(v, axis=1, keepdims=True), unit(rng, 9, 4))
    )
    image, text, *_ = independent_loss(v, v, 14.0, tv, -tv, 1.0 - rest, kappa)
    leaves = [torch.from_numpy(x).float() for x in (v, v, tv, -tv)]
    out = similarity_regulated_loss(*leaves[:2], 14.0, *leaves[2:], alpha=1.0 - rest, sharpness=kappa, backend=backend)
    np.testing.assert_allclose(out.image_to_text.numpy(), image, rtol=3e-5)
    np.testing.assert_allclose(out.text_to_image.numpy(), text, rtol=3e-5)
    without, *_ = independent_loss(v, v, 14.0, tv, -tv, 1.0, kappa)
    assert (kappa < 24 and rest < 1e-6) or abs(without - image).max() > 1e-3 * image.max()
