"""NLVR2's model: what it starts from, what it sees and in which order, and that all of it learns."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm

from sacl_ds.config import ModelConfig
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import write_tensors
from sacl_ds.tasks.nlvr2.data import StatementBatch
from sacl_ds.tasks.nlvr2.model import Nlvr2Model, Nlvr2Objective

SELECTIONS = {
    "none": None,
    "published": {"placement": "published", "layers": [1], "keep_rate": 0.5},
    "tower": {"placement": "tower", "layers": [1, 2], "keep_rate": 0.5},
    "output": {"placement": "output", "keep_rate": 0.5},
}


def settings(selection: dict[str, object] | None = None, **changes: object) -> ModelConfig:
    values = {**tiny.config(selection).model.model_dump(), "fusion_layers": 2, **changes}
    if selection:  # the more patches, the more there is to choose from
        values["image_encoder_arguments"] = {**values["image_encoder_arguments"], "patch_size": 8}
    return ModelConfig.model_validate(values)


def started(config: ModelConfig) -> SaclModel:
    torch.manual_seed(0)
    return tiny.varied(SaclModel(config, tiny.VOCABULARY, pretrained=False))


def statements(count: int, seed: int = 1) -> StatementBatch:
    one, other = (tiny.batch(count, seed)[0] for seed in (seed, seed + 100))
    labels = torch.arange(count) % 2
    return StatementBatch(one.keys, one.images, other.images, one.input_ids, one.attention_mask, labels, one.pair_ids)


def inputs(batch: StatementBatch) -> tuple[torch.Tensor, ...]:
    return batch.left, batch.right, batch.input_ids, batch.attention_mask


def attention(weights: dict[str, torch.Tensor], states, others, heads: int, mask=None) -> torch.Tensor:
    """What a BERT attention adds, from its equations, one head at a time."""
    query = states @ weights["self.query.weight"].T + weights["self.query.bias"]
    key = others @ weights["self.key.weight"].T + weights["self.key.bias"]
    value = others @ weights["self.value.weight"].T + weights["self.value.bias"]
    width = query.shape[-1] // heads
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[..., part] @ key[..., part].mT / width**0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, :].bool(), -torch.inf)
        mixed.append(logits.softmax(-1) @ value[..., part])
    out = torch.cat(mixed, -1) @ weights["output.dense.weight"].T + weights["output.dense.bias"]
    return normed(weights, "output.LayerNorm", out + states)


def normed(weights: dict[str, torch.Tensor], name: str, states: torch.Tensor) -> torch.Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return layer_norm(states, states.shape[-1:], weight, bias, eps=1e-12)


def block(weights: dict[str, torch.Tensor], states, mask, image, heads: int) -> torch.Tensor:
    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    states = attention(part("attention."), states, states, heads, mask)
    states = attention(part("crossattention."), states, image, heads)
    inner = gelu(states @ weights["intermediate.dense.weight"].T + weights["intermediate.dense.bias"])
    outer = inner @ weights["output.dense.weight"].T + weights["output.dense.bias"]
    return normed(weights, "output.LayerNorm", states + outer)


def test_it_starts_as_the_pretrained_layers_twice() -> None:
    """At the start, each pre-trained layer on the left image and then the same layer on the right one, computed here
    from the weights of the model it starts from."""
    start = started(settings()).double()
    layers = [
        {name: value.clone() for name, value in layer.state_dict().items()}
        for layer in start.fusion_encoder.encoder.layer
    ]
    assert len(layers) == 2
    model = Nlvr2Model(start, settings()).double().eval()
    batch = statements(3)
    with torch.no_grad():
        states = expected = model.text_encoder(batch.input_ids, batch.attention_mask)
        left, right = (model.image_encoder(images.double()).tokens for images in (batch.left, batch.right))
        for layer in layers:
            for image in (left, right):
                expected = block(layer, expected, batch.attention_mask, image, heads=2)
        fused = model.fusion_encoder(states, batch.attention_mask, torch.cat([left, right]))
        real = batch.attention_mask.bool()
        torch.testing.assert_close(fused[real], expected[real], rtol=0, atol=1e-10)
        hidden, _, last = model.classifier
        raised = (expected[:, 0] @ hidden.weight.T + hidden.bias).clamp(min=0)
        logits = model(batch.left.double(), batch.right.double(), batch.input_ids, batch.attention_mask)
        torch.testing.assert_close(logits, (raised @ last.weight.T + last.bias).float())
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 2)


def test_encoders_are_taken_over_and_the_fusion_is_copied() -> None:
    start = started(settings())
    model = Nlvr2Model(start, settings())
    assert model.image_encoder is start.image_encoder
    assert model.text_encoder is start.text_encoder
    theirs = {parameter.data_ptr() for parameter in start.fusion_encoder.parameters()}
    ours = [parameter.data_ptr() for parameter in model.fusion_encoder.parameters()]
    assert len(ours) == len(set(ours))
    assert not theirs & set(ours)


def test_parameters() -> None:
    """Two blocks a layer less one pair of key and value projections, and each name once."""
    start = started(settings())
    layer = sum(parameter.numel() for parameter in start.fusion_encoder.encoder.layer[0].parameters())
    cross = start.fusion_encoder.encoder.layer[0].crossattention.self
    shared = sum(parameter.numel() for part in (cross.key, cross.value) for parameter in part.parameters())
    model = Nlvr2Model(start, settings())
    assert sum(parameter.numel() for parameter in model.fusion_encoder.parameters()) == 2 * (2 * layer - shared)
    assert dict(model.named_parameters()).keys() == model.state_dict().keys()
    assert all(parameter.ndim for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.classifier.parameters()) == 24 * 24 + 24 + 2 * 24 + 2


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_parameter_has_a_gradient(selection: str) -> None:
    config = settings(SELECTIONS[selection])
    objective = Nlvr2Objective(tiny.varied(Nlvr2Model(started(config), config)).double().train())
    batch = statements(6)
    objective(batch)["loss"].backward()
    total = torch.stack([parameter.grad.norm() for parameter in objective.parameters()]).norm()
    for name, parameter in objective.named_parameters():
        # the same number added to all logits of a softmax: the gradient is zero but for rounding
        zero = name.endswith(("key.bias",))
        assert (parameter.grad.norm() > 1e-9 * total) != zero, name


@pytest.mark.parametrize("selection", SELECTIONS)
def test_statements_do_not_see_each_other_or_padding(selection: str) -> None:
    config = settings(SELECTIONS[selection])
    model = tiny.varied(Nlvr2Model(started(config), config))
    batch = statements(5)
    with torch.no_grad():
        together = model(*inputs(batch))
        for row in range(5):
            length = int(batch.attention_mask[row].sum())
            alone = model(
                batch.left[row : row + 1], batch.right[row : row + 1], batch.input_ids[row : row + 1, :length],
                torch.ones(1, length, dtype=torch.long),
            )  # fmt: skip
            torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-5)
    assert together.std(0).min() > 1e-3


@pytest.mark.parametrize("selection", SELECTIONS)
def test_left_and_right_are_told_apart(selection: str) -> None:
    config = settings(SELECTIONS[selection])
    model = tiny.varied(Nlvr2Model(started(config), config))
    left, right, ids, mask = inputs(statements(3))
    with torch.no_grad():
        whole = model(left, right, ids, mask)
        for changed in (
            model(right, left, ids, mask),
            model(255 - left, right, ids, mask),
            model(left, 255 - right, ids, mask),
        ):
            assert (changed - whole).abs().max() > 1e-3


@pytest.mark.parametrize("selection", ["published", "tower", "output"])
def test_the_sentence_chooses_the_patches_of_both(selection: str) -> None:
    """Each image by itself, with the sentence's [CLS] state for a guide."""
    config = settings(SELECTIONS[selection])
    model = tiny.varied(Nlvr2Model(started(config), config)).double()
    batch = statements(3)
    with torch.no_grad():
        states = model.text_encoder(batch.input_ids, batch.attention_mask)
        tokens = torch.cat([model.image_encoder(x.double(), states[:, 0]).tokens for x in (batch.left, batch.right)])
        assert tokens.shape[1] < 1 + 16
        expected = model.classifier(model.fusion_encoder(states, batch.attention_mask, tokens)[:, 0])
        got = model(batch.left.double(), batch.right.double(), batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_dropout_is_on_in_training_alone() -> None:
    config = settings(dropout=0.5)
    model = tiny.varied(Nlvr2Model(started(config), config))
    given = inputs(statements(3))
    with torch.no_grad():
        assert torch.equal(model(*given), model(*given))
        model.train()
        assert not torch.equal(model(*given), model(*given))


def test_weights_on_disk(tmp_path: Path) -> None:
    model = tiny.varied(Nlvr2Model(started(settings()), settings()))
    write_tensors(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(9)
    again = Nlvr2Model(SaclModel(settings(), tiny.VOCABULARY, pretrained=False), settings()).eval()
    given = inputs(statements(2))
    with torch.no_grad():
        assert not torch.equal(again(*given), model(*given))
        again.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(again(*given), model(*given))


def test_objective() -> None:
    objective = Nlvr2Objective(tiny.varied(Nlvr2Model(started(settings()), settings())))
    batch = statements(7)
    losses = objective(batch)
    with torch.no_grad():
        logits = objective.model(*inputs(batch)).double()
    of_right = logits.gather(1, batch.labels[:, None])[:, 0]
    expected = (logits.exp().sum(1).log() - of_right).mean()
    assert losses["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert losses["loss"].shape == losses["accuracy"].shape == ()
    right = (logits[:, 1] > logits[:, 0]) == batch.labels.bool()
    assert losses["accuracy"].item() == pytest.approx(right.double().mean().item())
    assert not losses["accuracy"].requires_grad


def test_it_learns_a_batch_by_heart() -> None:
    config = settings(init_gain=1.4)
    torch.manual_seed(0)
    objective = Nlvr2Objective(Nlvr2Model(SaclModel(config, tiny.VOCABULARY, pretrained=False), config))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    batch = statements(8)
    for _ in range(60):
        losses = objective(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["accuracy"] == 1
    assert losses["loss"] < 0.1
