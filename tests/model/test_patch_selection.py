"""Patch selection against a version written with loops, what it must not see, and what it must work with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_encoder import DEPTH, HEADS, MEAN, STD, WIDTH, encoder, pixels, texts
from starting import losses as losses_of
from starting import start
from torch import Tensor, nn

from sacl_ds.config import ModelConfig, PatchSelectionConfig
from sacl_ds.errors import UserError
from sacl_ds.model.patch_selection import SelectingEncoder, select
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import load_model
from sacl_ds.training.objective import PretrainObjective, Targets

LEAK_FREE = ("tower", "output")


# ---- the slow version: one image, one layer, one head, one patch at a time


def slow_layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def slow_scores(block: nn.Module, before: list[Tensor], after: list[Tensor], guide: Tensor | None, score: str) -> list:
    """before: what enters the block; after: its tokens behind the attention, or those that come out of the tower."""
    matrix, bias = block.attn.qkv.weight, block.attn.qkv.bias
    head = WIDTH // HEADS
    text = guide if guide is not None else slow_layer_norm(block.norm1, before[0])
    query = matrix[:WIDTH] @ text + bias[:WIDTH]
    if score == "tokens" and guide is not None:
        raw = [(query @ x / math.sqrt(WIDTH)).exp() for x in after[1:]]
        return [each / sum(raw) for each in raw]
    total = [torch.zeros((), dtype=torch.float64) for _ in after[1:]]
    for h in range(HEADS):
        part = slice(h * head, (h + 1) * head)
        logits = []
        for x in before[1:]:
            key = matrix[WIDTH : 2 * WIDTH] @ slow_layer_norm(block.norm1, x) + bias[WIDTH : 2 * WIDTH]
            logits.append(query[part] @ key[part] / math.sqrt(head))
        for place, value in enumerate(torch.stack(logits).softmax(0)):
            total[place] = total[place] + value / HEADS
    return total


def slow_attention_half(block: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
    attention, head = block.attn, WIDTH // HEADS
    projected = [attention.qkv.weight @ slow_layer_norm(block.norm1, x) + attention.qkv.bias for x in tokens]
    result = []
    for place, x in enumerate(tokens):
        mixed = []
        for h in range(HEADS):
            q, k, v = (slice(which * WIDTH + h * head, which * WIDTH + (h + 1) * head) for which in range(3))
            logits = torch.stack([projected[place][q] @ other[k] for other in projected]) / math.sqrt(head)
            shares = logits.softmax(0)
            mixed.append(sum(share * other[v] for share, other in zip(shares, projected, strict=True)))
        result.append(x + attention.proj.weight @ torch.cat(mixed) + attention.proj.bias)
    return result


def slow_second_half(block: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
    result = []
    for x in tokens:
        hidden = nn.functional.gelu(block.mlp.fc1.weight @ slow_layer_norm(block.norm2, x) + block.mlp.fc1.bias)
        result.append(x + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias)
    return result


def slow_select(tokens: list[Tensor], scores: list[Tensor], names: list[int], rate: float) -> tuple[list, list[int]]:
    """names: of the patches, by their place in the picture; a token behind the last of them is a fused one."""
    keep = math.ceil(rate * len(names) - 1e-9)
    best = sorted(range(len(names)), key=lambda place: -float(scores[place].detach()))[:keep]
    kept = [place for place in range(len(names)) if place in best]
    others = [place for place in range(len(scores)) if place not in best]
    total = sum(scores[place] for place in others)
    fused = sum(scores[place] / total * tokens[1 + place] for place in others)
    return [tokens[0], *(tokens[1 + place] for place in kept), fused], [names[place] for place in kept]


def slow_tower(made: SelectingEncoder, image: Tensor, guide: Tensor | None) -> tuple[Tensor, list[int]]:
    vit, settings = made.vit, made.selection
    x = (image.double() - 255 * torch.tensor(MEAN)[:, None, None]) / (255 * torch.tensor(STD)[:, None, None])
    tokens = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
    side = image.shape[-1] // 8
    for place in range(side * side):
        top, left = 8 * (place // side), 8 * (place % side)
        patch = x[:, top : top + 8, left : left + 8].flatten()
        embedded = vit.patch_embed.proj.weight.flatten(1) @ patch + vit.patch_embed.proj.bias
        tokens.append(embedded + vit.pos_embed[0, 1 + place])
    names = list(range(side * side))
    for number, block in enumerate(vit.blocks, 1):
        before, tokens = tokens, slow_attention_half(block, tokens)
        if settings.placement != "output" and number in settings.layers:
            scores = slow_scores(block, before, tokens, guide, settings.score)
            tokens, names = slow_select(tokens, scores, names, settings.keep_rate)
        tokens = slow_second_half(block, tokens)
    tokens = [slow_layer_norm(vit.norm, x) for x in tokens]
    if settings.placement == "output":
        scores = slow_scores(vit.blocks[-1], before, tokens, guide, settings.score)
        tokens, names = slow_select(tokens, scores, names, settings.keep_rate)
    return torch.stack(tokens), names


@pytest.mark.parametrize("keep_rate", [0.7, 0.3])
@pytest.mark.parametrize(
    ("placement", "guide", "score"),
    [
        ("tower", "text", "keys"), ("tower", "text", "tokens"), ("tower", "cls", "keys"), ("published", "text", "keys"),
        ("output", "text", "keys"), ("output", "text", "tokens"), ("output", "cls", "keys"),
    ],
)  # fmt: skip
def test_equals_the_slow_version(placement: str, guide: str, score: str, keep_rate: float) -> None:
    """Places kept, the fused token, all other tokens, and the gradient of every weight and of the text."""
    made = encoder(placement, guide=guide, score=score, keep_rate=keep_rate)
    images, text = pixels(2), texts(2).requires_grad_()
    fast = made(images, text)
    weights = torch.randn(fast.tokens.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [*made.parameters(), *([text] if guide == "text" else [])]
    of_fast = torch.autograd.grad((fast.tokens * weights).sum(), wanted)

    slow = [slow_tower(made, image, t if guide == "text" else None) for image, t in zip(images, text, strict=True)]
    assert fast.places.tolist() == [names for _, names in slow]
    assert len({tuple(row) for row in fast.places.tolist()}) == 2, "both images keep the same patches"
    tokens = torch.stack([tokens for tokens, _ in slow])
    torch.testing.assert_close(fast.tokens, tokens, rtol=0, atol=1e-10)
    of_slow = torch.autograd.grad((tokens * weights).sum(), wanted, allow_unused=True)
    for one, other in zip(of_fast, of_slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if guide == "text":
        assert of_fast[-1].abs().max() > 1e-6, "the text has no gradient"


@pytest.mark.parametrize("placement", LEAK_FREE)
def test_texts_that_come_later_choose_as_if_they_had_been_there(placement: str) -> None:
    made = encoder(placement)
    images, text = pixels(3), texts(5)
    pairs = torch.tensor([2, 0, 0, 1, 2])
    late = made.guided(made(images), text, pairs)
    early = made(images[pairs], text)
    assert torch.equal(late.places, early.places)
    torch.testing.assert_close(late.tokens, early.tokens, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 1.0), st.booleans(), st.integers(0, 1000))
def test_select(patches: int, rate: float, fused: bool, seed: int) -> None:
    """[CLS] first, the patches of highest score in their order, then the mean of all others by their scores."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 1 + patches + fused, 3, generator=generator, dtype=torch.float64)
    scores = torch.rand(2, patches + fused, generator=generator, dtype=torch.float64).softmax(1)
    keep = PatchSelectionConfig(keep_rate=rate).kept_count(patches)
    assert 1 <= keep <= patches
    assert keep - 1 < rate * patches + 1e-6
    chosen, places = select(tokens, scores, keep, fused)
    if keep == patches:
        assert torch.equal(chosen, tokens)
        return
    assert chosen.shape == (2, keep + 2, 3)
    for row in range(2):
        left = [place for place in range(patches + fused) if place not in places[row].tolist()]
        assert places[row].tolist() == sorted(places[row].tolist())
        assert all(scores[row, p] <= scores[row, places[row]].min() for p in left if p < patches)
        assert torch.equal(chosen[row, :-1], tokens[row, [0, *(1 + places[row]).tolist()]])
        mixed = (scores[row, left] / scores[row, left].sum()) @ tokens[row, 1:][left]
        torch.testing.assert_close(chosen[row, -1], mixed)


def test_a_layer_that_keeps_all_is_timms_own() -> None:
    made = encoder("tower", keep_rate=1.0)
    images = pixels(2)
    plain = made.vit.forward_features((images - made.mean) / made.std)
    torch.testing.assert_close(made(images, texts(2)).tokens, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(made(images).tokens, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "vit_base_patch14_dinov2", "vit_small_r26_s32_224"])
@pytest.mark.parametrize("size", [48, 64])
def test_other_vits_and_sizes(name: str, size: int) -> None:
    """A norm before the layers (CLIP), layer scale (DINOv2), convolutions for patches; any resolution."""
    arguments = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    if "r26" not in name:
        arguments["patch_size"] = 8
    selection = PatchSelectionConfig(placement="tower", layers=[2, 3])
    pixels_a_side = 2 * size if "r26" in name else size
    made = SelectingEncoder(name, pixels_a_side, MEAN, STD, False, arguments, selection=selection).eval()
    images = pixels(2, pixels_a_side)
    patches = made.vit.patch_embed.num_patches
    kept = math.ceil(0.7 * math.ceil(0.7 * patches - 1e-9) - 1e-9)
    assert made(images, texts(2).float()).tokens.shape == (2, kept + 2, WIDTH)
    torch.testing.assert_close(
        made(images).tokens, made.vit.forward_features((images - made.mean) / made.std), rtol=0, atol=1e-5
    )


def test_the_state_dict_is_the_same_with_it_and_without() -> None:
    states = [tiny.objective(tiny.config({"placement": placement, "layers": [1, 2]})).state_dict()
              for placement in ("none", "tower", "output", "published")]  # fmt: skip
    for other in states[1:]:
        assert list(other) == list(states[0])
        assert all(torch.equal(other[name], states[0][name]) for name in other)


def objective(placement: str, **more: object) -> PretrainObjective:
    """With weights large enough that what one token says moves the others."""
    chosen = {"placement": placement, "layers": [1, 2], "keep_rate": 0.5, **more}
    made = tiny.objective(tiny.config(chosen)).double()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


def losses(made: PretrainObjective, batch, teacher) -> dict[str, Tensor]:
    return made(batch, Targets(teacher, 0.5, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("placement", ["tower", "output", "published"])
def test_itc_features_of_images_do_not_depend_on_any_text(placement: str) -> None:
    """Neither by their value nor by a gradient; `published` does by both, and is what a leak looks like."""
    made = objective(placement)
    batch, _ = tiny.batch(6)
    model = made.model
    found = []
    for shift in (0, 7):
        ids = torch.where(batch.attention_mask.bool(), 5 + (batch.input_ids + shift) % 30, 0)
        states, _ = model.encode_text(ids, batch.attention_mask)
        guide = states[:, 0] if model.captions_choose else None
        _, image = model.encode_image(batch.images, guide)
        found.append(image)
        of_text = torch.autograd.grad(image.sum(), list(model.text_encoder.parameters()), allow_unused=True)
        leaks = any(gradient is not None and gradient.abs().max() > 0 for gradient in of_text)
        assert leaks == (placement == "published")
    assert torch.equal(*found) == (placement != "published")


@pytest.mark.parametrize("placement", ["tower", "output", "published"])
def test_masked_words_do_not_reach_mlm_through_the_patches(placement: str) -> None:
    """Other words behind the masks, the same masked caption: MLM's logits are the same, so its loss is that of the
    other labels. `published` chooses by the whole caption."""
    made = objective(placement)
    batch, teacher = tiny.batch(6)
    hidden = batch.mlm_labels != -100
    other = torch.where(hidden, 5 + (batch.input_ids + 11) % 30, batch.input_ids)
    changed = tiny.rows(batch, teacher, 0, 6)[0]
    object.__setattr__(changed, "input_ids", other)
    one, two = (losses(made, each, teacher)["mlm"] for each in (batch, changed))
    assert torch.equal(one, two) == (placement != "published")


@pytest.mark.parametrize("placement", ["tower", "output", "published"])
def test_the_whole_objective_learns_from_selected_patches(placement: str) -> None:
    made = objective(placement)
    batch, teacher = tiny.batch(6)
    losses(made, batch, teacher)["loss"].backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("placement", ["tower", "output", "published"])
def test_activation_checkpointing_changes_no_gradient(placement: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        made = objective(placement)
        made.model.image_encoder.vit.set_grad_checkpointing(checkpointing)
        batch, teacher = tiny.batch(6)
        losses(made, batch, teacher)["loss"].backward()
        gradients.append({name: p.grad for name, p in made.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("placement", "score"), [("tower", "keys"), ("output", "tokens")])
def test_bf16(placement: str, score: str) -> None:
    """Under autocast: finite, near what float32 gives, scores in float32."""
    made = encoder(placement, score=score).float()
    images, text = pixels(2), texts(2).float()
    whole = made(images, text)
    with torch.autocast("cpu", torch.bfloat16):
        half = made(images, text)
        half.tokens.float().sum().backward()
    assert half.places.shape == whole.places.shape
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    same = (half.places == whole.places).all(1)
    if same.any():
        difference = (half.tokens[same].float() - whole.tokens[same]).norm() / whole.tokens[same].norm()
        assert difference < 0.1


@pytest.mark.parametrize("placement", ["tower", "output"])
def test_compiles_into_one_graph(placement: str) -> None:
    """torch.compile, without a break, forward and backward."""
    made = encoder(placement).float()
    images, text = pixels(2), texts(2).float()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    one, other = made(images, text), compiled(images, text)
    torch.testing.assert_close(one.tokens, other.tokens)
    gradients = [torch.autograd.grad(states.tokens.sum(), made.vit.patch_embed.proj.weight) for states in (one, other)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"patch_selection": {"placement": "tower", "layers": [9]}},
            r"no layer 9 in its 2; set model.patch_selection.layers, counted from 1, e.g. \[1\]",
        ),
        ({"text_width": 48}, "model.text_width=48, vit_tiny_patch16_224 has 32"),
        ({"image_encoder": "eva02_tiny_patch14_224"}, "Eva cannot select; choose a VisionTransformer"),
        ({"image_encoder": "vit_relpos_base_patch16_clsgap_224"}, "cannot select; choose"),
    ],
)
def test_what_cannot_select_says_so(changes: dict, line: str) -> None:
    values = tiny.config({"placement": "tower", "layers": [1, 2]}).model.model_dump()
    if "image_encoder" in changes:
        values["image_encoder_arguments"] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    with pytest.raises(UserError, match=line) as error:
        SaclModel(ModelConfig.model_validate(values | changes), 50, pretrained=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("placement", "ranks", "stage"), [("tower", 2, 3), ("published", 1, 2)])
def test_a_run(placement: str, ranks: int, stage: int, tmp_path: Path) -> None:
    """Trained, evaluated and loaded again; a caption that chooses before ITC is warned of."""
    settings = [f"model.patch_selection.{each}" for each in (f"placement={placement}", "layers=[1]", "keep_rate=0.5")]
    done = start(tmp_path / "run", *settings, "teacher.steps=0", "train.steps=4", ranks=ranks, stage=stage)
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))
    assert ("ITC, which can find the pair" in " ".join(done.stdout.split())) == (placement == "published")
    model, run, _ = load_model(tmp_path / "run", "output_dir")
    assert run.model.patch_selection.placement == placement
    batch = pixels(2, run.model.image_size)
    kept = model.image_encoder(batch, torch.randn(2, 32)).places
    assert kept.shape == (2, 5)  # of 9
