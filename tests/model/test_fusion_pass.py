"""Texts without their padding, keys and values shared by an image's texts, ITM and MLM in one pass: equal to what they
replace, which transformers' own modules compute here, one pair after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from sacl_ds.config import ModelConfig
from sacl_ds.data.batch import Batch, concatenate
from sacl_ds.data.text import IGNORED
from sacl_ds.losses import hard_negatives
from sacl_ds.losses.streaming import shared_ids
from sacl_ds.model.sacl import SaclModel, predicted_tokens
from sacl_ds.model.text import Packing
from sacl_ds.training.objective import PretrainObjective, Targets

SELECTIONS = {
    "none": None,
    "tower": {"placement": "tower", "layers": [1], "keep_rate": 0.5},
    "cls": {"placement": "tower", "guide": "cls", "layers": [1], "keep_rate": 0.5},
    "output": {"placement": "output", "keep_rate": 0.5},
    "published": {"placement": "published", "layers": [1], "keep_rate": 0.5},
}


def objective(selection: str = "none", **loss: object) -> PretrainObjective:
    """Of two layers each, float64, every parameter moved."""
    run = tiny.config(SELECTIONS[selection], **loss)
    settings = ModelConfig.model_validate(run.model.model_dump() | {"text_layers": 2, "fusion_layers": 2})
    torch.manual_seed(0)
    made = PretrainObjective(SaclModel(settings, tiny.VOCABULARY, pretrained=False), run.loss).double()
    tiny.varied(made)
    return made


def with_places(batch: Batch) -> Batch:
    assert batch.mlm_labels is not None
    predicted = [place for place, label in enumerate(batch.mlm_labels.flatten().tolist()) if label != IGNORED]
    real = [place for place, used in enumerate(batch.attention_mask.flatten().tolist()) if used]
    return replace(batch, token_places=torch.tensor(real), mlm_places=torch.tensor(predicted))


def fused_alone(model: SaclModel, states: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """transformers' BertEncoder over each text by itself, without padding; joined: (real tokens, width)."""
    parts = []
    for row, used, image in zip(states, mask.bool(), tokens, strict=True):
        own = row[used][None]
        allowed = torch.ones(1, 1, own.shape[1], own.shape[1], dtype=torch.bool)
        seen = model.fusion_encoder.encoder(own, attention_mask=allowed, encoder_hidden_states=image[None])
        parts.append(seen.last_hidden_state[0])
    return torch.cat(parts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_unpacking_undoes_packing(rows: int, length: int, data: st.DataObject) -> None:
    """And its gradient is that of a boolean mask."""
    chosen = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    mask = torch.tensor(chosen).view(rows, length)
    places = torch.tensor([place for place, real in enumerate(chosen) if real], dtype=torch.long)
    packing = Packing.of(mask, places)
    states = torch.randn(rows, length, 3, dtype=torch.float64, requires_grad=True)
    packed = packing.pack(states)
    assert torch.equal(packed, states[mask])
    assert torch.equal(packing.unpack(packed), states * mask[..., None])
    assert packing.positions(mask.device).tolist() == [place % length for place in places.tolist()]
    weights = torch.randn(rows, length, 3, dtype=torch.float64)
    (packing.unpack(packed.square()) * weights).sum().backward()
    torch.testing.assert_close(states.grad, 2 * states.detach() * weights * mask[..., None])


def test_packing_of_all_is_a_view() -> None:
    states = torch.randn(2, 3, 4)
    packing = Packing.of(states[..., 0], None)
    assert packing.pack(states).data_ptr() == packing.unpack(packing.pack(states)).data_ptr() == states.data_ptr()
    assert packing.positions(states.device).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_text_is_that_of_transformers(packed: bool) -> None:
    model, batch = objective().model, with_places(tiny.batch(5)[0])
    real = batch.attention_mask.bool()
    expected = model.text_encoder.bert(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    got = model.text_encoder(batch.input_ids, batch.attention_mask, batch.token_places if packed else None)
    torch.testing.assert_close(got[real], expected.last_hidden_state[real])
    if packed:
        assert (got[~real] == 0).all()
    else:
        torch.testing.assert_close(got, expected.last_hidden_state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("repeats", "others"), [(1, 0), (3, 0), (1, 2), (3, 4)])
def test_fusion_is_that_of_transformers(repeats: int, others: int, packed: bool) -> None:
    """Of every row by itself, and the gradients of all that goes in."""
    model, b, length = objective().model, 3, 7
    g = torch.Generator().manual_seed(repeats + others)
    n = repeats * b + others
    mask = (torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=g)).long()
    states = torch.randn(n, length, 24, generator=g, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(b, 5, 32, generator=g, dtype=torch.float64, requires_grad=True)
    images = torch.randint(0, b, (others,), generator=g) if others else None
    looked_at = torch.cat([torch.arange(b).repeat(repeats), torch.zeros(0).long() if images is None else images])
    places = mask.flatten().nonzero().squeeze(1) if packed else None
    got = model.fuse(states, mask, tokens, repeats=repeats, images=images, places=places)[mask.bool()]
    expected = fused_alone(model, states, mask, tokens[looked_at])
    torch.testing.assert_close(got, expected)
    weights = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    key = model.fusion_encoder.encoder.layer[1].crossattention.self.key.weight
    gradients = [torch.autograd.grad((of * weights).sum(), (states, tokens, key)) for of in (got, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_pass_is_the_sum_of_the_former_ones(selection: str, packed: bool) -> None:
    """ITM over 3b pairs and MLM over b, each pair fused by transformers, without padding."""
    made, (batch, _) = objective(selection), tiny.batch(5)
    model, b = made.model, 5
    losses = made(with_places(batch) if packed else batch, Targets(None, 0.0, torch.Generator().manual_seed(3)))

    states, text = model.encode_text(batch.input_ids, batch.attention_mask)
    image_states, image = model.encode_image(batch.images, states[:, 0] if model.captions_choose else None)
    drawn = hard_negatives(
        image, text, model.logit_scale(), batch.pair_ids, made.settings.matching_hardness, None,
        torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert not made.settings.matching_regulated
    pairs = [(i, i, 1, True) for i in range(b)]
    pairs += [(int(drawn.text[i]), i, 0, bool(drawn.text_found[i])) for i in range(b)]
    pairs += [(i, int(drawn.image[i]), 0, bool(drawn.image_found[i])) for i in range(b)]
    texts, images, labels, valid = (torch.tensor(column) for column in zip(*pairs, strict=True))
    tokens = model.image_tokens(image_states, states[texts, 0], images)
    mask = batch.attention_mask[texts]
    first = torch.cat([torch.zeros(1).long(), mask.sum(1).cumsum(0)[:-1]])
    logits = model.matching_head(fused_alone(model, states[texts], mask, tokens)[first])
    torch.testing.assert_close(losses["itm"], cross_entropy(logits[valid].float(), labels[valid]).to(losses["itm"]))

    states = model.text_encoder(batch.masked_ids, batch.attention_mask)
    tokens = model.image_tokens(image_states, states[:, 0])
    fused = fused_alone(model, states, batch.attention_mask, tokens)
    of_real = batch.mlm_labels[batch.attention_mask.bool()]
    expected = cross_entropy(model.token_logits(fused[of_real != IGNORED]), of_real[of_real != IGNORED])
    torch.testing.assert_close(losses["mlm"], expected)
    got = predicted_tokens(model, image_states, with_places(batch) if packed else batch)
    torch.testing.assert_close(got, model.token_logits(fused[of_real != IGNORED]))


@pytest.mark.parametrize(("weights", "texts", "fused"), [((1, 1), 10, 20), ((1, 0), 5, 15), ((0, 1), 10, 5)])
def test_what_is_not_asked_for_is_not_computed(weights: tuple[int, int], texts: int, fused: int) -> None:
    made, seen = objective(matching_weight=weights[0], mlm_weight=weights[1]), {}
    for name in ("text_encoder", "fusion_encoder"):
        module = getattr(made.model, name)
        module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(len(out)))
    losses = made(tiny.batch(5)[0], Targets(None, 0.0, None))
    assert seen == {"text_encoder": [texts], "fusion_encoder": [fused]}
    assert ("itm" in losses, "mlm" in losses) == tuple(map(bool, weights))


def test_contrast_alone_needs_no_fusion() -> None:
    made = objective(matching_weight=0, mlm_weight=0)
    fused: list[object] = []
    made.model.fusion_encoder.register_forward_hook(lambda *_: fused.append(None))
    made(tiny.batch(3)[0], Targets(None, 0.0, None))["loss"].backward()
    assert not fused


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1000))
def test_places_of_joined_batches(sizes: list[int], seed: int) -> None:
    """As they are found in the joined batch itself."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for number, size in enumerate(sizes):
        part, length = tiny.batch(size, seed + number)[0], int(torch.randint(5, 11, (1,), generator=g))
        cut = {
            name: getattr(part, name)[:, :length]
            for name in ("input_ids", "attention_mask", "masked_ids", "mlm_labels")
        }
        parts.append(with_places(replace(part, **cut)))
    joined = concatenate(parts, 0)
    expected = with_places(joined)
    assert torch.equal(joined.token_places, expected.token_places)
    assert torch.equal(joined.mlm_places, expected.mlm_places)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4)] * 2), min_size=1, max_size=30))
def test_shared_ids_are_those_of_unique(rows: list[tuple[int, int]]) -> None:
    ids = torch.tensor(rows)
    numbers, shared = shared_ids(ids)
    assert numbers.dtype == torch.int32
    for column in range(2):
        assert numbers[:, column].tolist() == [sorted(set(ids[:, column].tolist())).index(row[column]) for row in rows]
    assert shared.tolist() == [any(sum(row[c] == other[c] for other in rows) > 1 for c in range(2)) for row in rows]
