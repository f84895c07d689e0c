"""`SimilarityRegulatedLoss` is `similarity_regulated_loss` with its settings kept."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from loss_cases import OPTIONS, features, ids_of
from torch import Tensor, nn

from sacl_ds.losses import Keys, SimilarityRegulatedLoss, similarity_regulated_loss

N = 17


def leaves(seed: int = 0) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Image, text and logit scale, to be differentiated; ids; the teacher's features."""
    pairs = features(N, 6, seed)
    of_model = [*pairs[:2], torch.tensor(14.0, dtype=torch.float64)]
    return [x.requires_grad_() for x in of_model], ids_of(N, 2), pairs[2:]


def assert_same(got: Callable[..., Tensor], expected: Callable[..., Tensor]) -> None:
    """got, expected: functions of leaves, ids and teacher; values and gradients to the bit."""
    values = []
    for function in (got, expected):
        inputs, ids, teacher = leaves()
        loss = function(inputs, ids, teacher)
        assert loss.shape == ()
        values.append([loss, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*values, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_function_for_every_setting(name: str, backend: str) -> None:
    loss, settings = SimilarityRegulatedLoss(**OPTIONS[name], backend=backend), OPTIONS[name]
    teaches = settings.get("alpha", 0) > 0

    def by_function(inputs, ids, teacher):
        some = teacher if teaches else [None, None]
        return similarity_regulated_loss(*inputs, *some, pair_ids=ids, backend=backend, **settings).loss

    assert_same(lambda inputs, ids, teacher: loss(*inputs, *(teacher if teaches else ()), pair_ids=ids), by_function)


def test_keys_and_soft_targets() -> None:
    momentum = features(N, 6, 5)
    keys = Keys(*momentum[:2])
    loss = SimilarityRegulatedLoss(alpha=0.4, sharpness=3.0, soft_weight=0.3)
    assert_same(
        lambda inputs, ids, teacher: loss(*inputs, *teacher, ids, keys),
        lambda inputs, ids, teacher: (
            similarity_regulated_loss(
                *inputs, *teacher, pair_ids=ids, alpha=0.4, sharpness=3.0, keys=keys, soft_weight=0.3
            ).loss
        ),
    )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_of_a_call_comes_before_the_constructors(alpha: float) -> None:
    """A schedule's; the module keeps its own for the next call."""
    loss = SimilarityRegulatedLoss(alpha=0.6, sharpness=3.0)

    def with_alpha(value: float) -> Callable[..., Tensor]:
        return lambda inputs, ids, teacher: (
            similarity_regulated_loss(*inputs, *teacher, pair_ids=ids, sharpness=3.0, alpha=value).loss
        )

    assert_same(lambda inputs, ids, teacher: loss(*inputs, *teacher, ids, alpha=alpha), with_alpha(alpha))
    assert_same(lambda inputs, ids, teacher: loss(*inputs, *teacher, ids), with_alpha(0.6))
    assert with_alpha(alpha)(*leaves()).item() != with_alpha(0.6)(*leaves()).item()


def test_it_holds_no_state_and_goes_through_torchs_operations() -> None:
    loss = SimilarityRegulatedLoss(0.6, 3.0, 5.0, 0.5, group=None, backend="streaming")
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == list(loss.buffers()) == []
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    copies = [
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(file, weights_only=False),
        copy.deepcopy(loss).to("cpu").half().double().eval().train().requires_grad_(False),
    ]
    for each in copies:
        each.load_state_dict({})
        assert_same(lambda *a, each=each: each(*a[0], *a[2], a[1]), lambda *a: loss(*a[0], *a[2], a[1]))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text, self.loss = nn.Linear(4, 3), nn.Linear(5, 3), SimilarityRegulatedLoss(sharpness=3.0)

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            unit = (nn.functional.normalize(side, dim=1) for side in (self.image(image), self.text(text)))
            return self.loss(*unit, torch.tensor(10.0))

    model = Model()
    assert set(model.state_dict()) == {"image.weight", "image.bias", "text.weight", "text.bias"}
    model(torch.randn(6, 4), torch.randn(6, 5)).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    shown = "alpha=0.6, sharpness=3.0, teacher_sharpness=5.0, negative_mass=0.5, drop_below=None, soft_weight=0.0"
    assert repr(loss) == f"SimilarityRegulatedLoss({shown}, backend='streaming')"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"\[0, 1\]"),
        ({"teacher_sharpness": -1.0}, "negative"),
        ({"negative_mass": 0.0}, "positive"),
        ({"drop_below": 0.0}, "positive"),
        ({"backend": "fast"}, "choose one of"),
    ],
)
def test_a_bad_setting_is_said_when_it_is_made(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimilarityRegulatedLoss(**settings)
