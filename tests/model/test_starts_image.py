"""Weights for the image encoder, in the files that the libraries write: the tower computes what theirs computes."""

from pathlib import Path

import openai_clip
import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import varied
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from sacl_ds.config import ModelConfig
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.starts.report import SourceReport
from sacl_ds.model.starts.start import load_starts

QUICK, PLAIN = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224"
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config(encoder: str, weights: object, size: int = 32, **arguments: object) -> ModelConfig:
    values = {
        **tiny.config().model.model_dump(),
        "image_encoder": encoder,
        "image_encoder_arguments": {**SIZES, **arguments},
        "image_size": size,
        "image_weights": str(weights),
    }
    return ModelConfig.model_validate(values)


def started(settings: ModelConfig) -> tuple[SaclModel, SourceReport]:
    torch.manual_seed(0)
    model = SaclModel(settings, 50, pretrained=True).eval()
    report = load_starts(model, settings)
    (source,) = report.sources
    assert set(source.loaded) <= set(model.state_dict())
    return model, source


def pictures(model: SaclModel, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 and normalised."""
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return images, (images - model.image_encoder.mean) / model.image_encoder.std


@torch.no_grad()
def same_tokens(model: SaclModel, expected: torch.Tensor, size: int = 32) -> None:
    states, _ = model.encode_image(pictures(model, size)[0])
    torch.testing.assert_close(states.tokens, expected, rtol=0, atol=1e-5)


def clip(kind: str, act: str = "quick_gelu") -> nn.Module:
    if kind == "model":
        vision, text = {**VISION, "hidden_act": act}, {**TEXT, **SPECIAL}
        return varied(CLIPModel(CLIPConfig(vision_config=vision, text_config=text)))
    whole = CLIPVisionModel if kind == "vision" else CLIPVisionModelWithProjection
    return varied(whole(CLIPVisionConfig(**VISION, hidden_act=act)))


@torch.no_grad()
def tokens_of(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """All tokens after the last norm, of a CLIP of transformers, which itself norms the class token alone."""
    tower = getattr(model, "vision_model", model)
    return tower.post_layernorm(tower(pixel_values=pixels).last_hidden_state)


@pytest.mark.parametrize(("kind", "act"), [("model", "quick_gelu"), ("vision", "gelu"), ("projection", "quick_gelu")])
def test_a_clip_folder_of_transformers(kind: str, act: str, tmp_path: Path) -> None:
    original = clip(kind, act)
    original.save_pretrained(tmp_path)
    model, source = started(config(QUICK if act == "quick_gelu" else PLAIN, tmp_path))
    same_tokens(model, tokens_of(original, pictures(model)[1]))
    assert not source.notes
    assert len(source.loaded) == len(model.image_encoder.vit.state_dict())
    assert any(name.startswith("visual_projection") for name in source.left_over) == (kind != "vision")


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    """transformers would fill it with chance, and hand that over with the rest."""
    clip("model").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["vision_model.post_layernorm.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it lacks norm\.bias of the model's tensors; give weights that are whole$"):
        started(config(QUICK, tmp_path))
    del state["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.weight is 64 × 32 there and 96 × 32 in the model"):
        started(config(QUICK, tmp_path))


@pytest.mark.parametrize("kind", ["model", "vision"])
def test_a_file_of_transformers(kind: str, tmp_path: Path) -> None:
    """Without its config.json the activation cannot be known: that is said."""
    original = clip(kind)
    original.save_pretrained(tmp_path)
    model, source = started(config(QUICK, tmp_path / "model.safetensors"))
    same_tokens(model, tokens_of(original, pictures(model)[1]))
    assert f"if these have gelu, set model.image_encoder={PLAIN}" in "\n".join(source.notes)


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "module"])
@pytest.mark.parametrize("quick", [True, False])
def test_a_checkpoint_of_open_clip(wrapped: str, quick: bool, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    original = open_clip.CLIP(
        16,
        {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        quick_gelu=quick,
    )
    varied(original)
    state = original.state_dict()
    if wrapped == "bare":
        save_file(state, tmp_path / "weights.safetensors")
    elif wrapped == "state_dict":
        torch.save({"epoch": 3, "name": "x", "state_dict": state}, tmp_path / "weights.safetensors.pt")
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "weights.pt")
    (file,) = tmp_path.iterdir()
    model, source = started(config(QUICK if quick else PLAIN, file))
    seen = []
    original.visual.ln_post.register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.no_grad():
        original.encode_image(pictures(model)[1])
    same_tokens(model, seen[0])
    assert {"logit_scale", "visual.proj"} <= set(source.left_over)
    assert "does not say its activation" in source.notes[0]


@pytest.mark.parametrize("kind", ["whole", "tower"])
def test_openais_names(kind: str, tmp_path: Path) -> None:
    original = varied(openai_clip.Clip())
    saved = original if kind == "whole" else original.visual
    torch.save(saved.state_dict(), tmp_path / "clip.pt")
    model, source = started(config(QUICK, tmp_path / "clip.pt"))
    with torch.no_grad():
        same_tokens(model, original(pictures(model)[1]))
    left = {"positional_embedding", "logit_scale", "visual.proj"} if kind == "whole" else {"proj"}
    assert set(source.left_over) == left


def test_a_torchscript_archive(tmp_path: Path) -> None:
    """As OpenAI publishes CLIP, in half precision; it is QuickGELU without saying so."""
    original = varied(openai_clip.Clip())
    original.load_state_dict({name: value.half().float() for name, value in original.state_dict().items()})
    half = openai_clip.Clip().half()
    half.load_state_dict(original.state_dict())
    with torch.no_grad():
        torch.jit.trace(half, torch.zeros(1, 3, 32, 32).half()).save(str(tmp_path / "ViT.pt"))
    model, source = started(config(QUICK, tmp_path / "ViT.pt"))
    with torch.no_grad():
        same_tokens(model, original(pictures(model)[1]))
    assert not [note for note in source.notes if "activation" in note]
    with pytest.raises(UserError, match=f"trained with quick_gelu, .* computes gelu; set model.image_encoder={QUICK}$"):
        started(config(PLAIN, tmp_path / "ViT.pt"))


@pytest.mark.parametrize("kind", ["folder's file", "state dict", "model in a checkpoint", "before zip files"])
def test_weights_of_timm(kind: str, tmp_path: Path) -> None:
    name = "vit_base_patch16_224"
    original = varied(timm.create_model(name, img_size=32, num_classes=5, **SIZES))
    file = tmp_path / "model.safetensors"
    if kind == "folder's file":
        timm.models.save_for_hf(original, str(tmp_path), safe_serialization=True)
    elif kind == "state dict":
        save_file(original.state_dict(), file)
    elif kind == "before zip files":
        file = tmp_path / "checkpoint.pth"
        torch.save(original.state_dict(), file, _use_new_zipfile_serialization=False)
    else:
        file = tmp_path / "checkpoint.pth"
        torch.save({"model": original.state_dict(), "epoch": 1}, file)
    model, source = started(config(name, file))
    with torch.no_grad():
        same_tokens(model, original.forward_features(pictures(model)[1]))
    assert set(source.left_over) == {"head.weight", "head.bias"}
    assert not source.notes


def test_a_tower_of_timm_inside_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "token", "timm_proj": "linear"}
    text = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    original = varied(open_clip.CLIP(16, vision, text))
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    settings = config("vit_tiny_patch16_224", tmp_path / "weights.safetensors", 224)
    model, source = started(settings.model_copy(update={"image_encoder_arguments": {}}))
    with torch.no_grad():
        same_tokens(model, original.visual.trunk.forward_features(pictures(model, 224)[1]), 224)
    assert "visual.head.proj.weight" in source.left_over


@pytest.mark.parametrize("layout", ["transformers", "openai", "timm"])
def test_position_embeddings_at_another_resolution(layout: str, tmp_path: Path) -> None:
    """Bicubic with antialiasing, the class token's as it was; the tower then is the original with those."""
    timm_model = varied(timm.create_model(QUICK, img_size=32, num_classes=0, **SIZES))
    originals = {"transformers": clip("model"), "openai": varied(openai_clip.Clip()), "timm": timm_model}
    original = originals[layout]
    names = {
        "transformers": "vision_model.embeddings.position_embedding.weight",
        "openai": "visual.positional_embedding",
        "timm": "pos_embed",
    }
    if layout == "transformers":
        original.save_pretrained(tmp_path)
    else:
        torch.save(original.state_dict(), tmp_path / "weights.pt")
    weights = tmp_path if layout == "transformers" else tmp_path / "weights.pt"
    before = original.state_dict()[names[layout]].reshape(1, 17, 32)
    grid = before[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    for size in (48, 24):
        model, source = started(config(QUICK, weights, size))
        side = size // 8
        resized = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
        expected = torch.cat([before[:, :1], resized.permute(0, 2, 3, 1).reshape(1, side * side, 32)], dim=1)
        torch.testing.assert_close(model.image_encoder.vit.pos_embed.detach(), expected)
        assert f"position embeddings interpolated from 4 × 4 patches to {side} × {side}" in source.notes
    model, source = started(config(QUICK, weights))
    assert torch.equal(model.image_encoder.vit.pos_embed, before)
    assert not [note for note in source.notes if "interpolated" in note]


def test_a_norm_before_the_blocks_is_never_silent(tmp_path: Path) -> None:
    plain = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0, **SIZES)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    model, source = started(config(PLAIN, tmp_path / "plain.safetensors"))
    new = set(model.state_dict()) - set(source.loaded)
    assert {name for name in new if ".vit." in name} == {f"image_encoder.vit.norm_pre.{x}" for x in ("weight", "bias")}
    assert "the weights have none: it is new" in source.notes[0]
    normed = model.image_encoder.vit.state_dict()
    save_file(normed, tmp_path / "pre.safetensors")
    with pytest.raises(UserError, match=r"it lacks patch_embed\.proj\.bias of the model's tensors"):
        started(config("vit_base_patch16_224", tmp_path / "pre.safetensors"))
    save_file(normed | {"patch_embed.proj.bias": torch.zeros(32)}, tmp_path / "pre.safetensors")
    _, source = started(config("vit_base_patch16_224", tmp_path / "pre.safetensors"))
    assert set(source.left_over) == {"norm_pre.weight", "norm_pre.bias"}
    assert "has none: it computes something else" in source.notes[0]


def test_what_clips_config_says_and_the_model_is_not(tmp_path: Path) -> None:
    clip("model").save_pretrained(tmp_path / "quick")
    clip("vision", "gelu").save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=rf"quick: trained with quick_gelu, .*set model\.image_encoder={QUICK}$"):
        started(config(f"{PLAIN}.openai", tmp_path / "quick"))
    with pytest.raises(UserError, match=rf"plain: trained with gelu, .*set model\.image_encoder={PLAIN}$"):
        started(config(QUICK, tmp_path / "plain"))
    with pytest.raises(UserError, match=r"set model\.image_encoder_arguments\.act_layer=quick_gelu$"):
        started(config("vit_base_patch16_224", tmp_path / "quick"))
    model, source = started(config("vit_base_patch16_224", tmp_path / "quick", act_layer="quick_gelu", pre_norm=True))
    assert type(model.image_encoder.vit.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert "norms have eps 1e-05 there and 1e-06 in the model" in source.notes
    with pytest.raises(UserError, match=r"2 heads there and 4 in the model; set .*num_heads=2$"):
        started(config(QUICK, tmp_path / "quick", num_heads=4))


def test_the_base_preset_is_what_openai_trained() -> None:
    settings = ModelConfig.model_validate({"preset": "base"})
    vit = timm.create_model(settings.image_encoder.partition(".")[0], depth=1, embed_dim=32, num_heads=2)
    assert type(vit.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert timm.models.get_pretrained_cfg(settings.image_encoder).tag == "openai"


def written(folder: Path, kind: str) -> Path:
    """A source that cannot be used."""
    file = folder / "weights.pt"
    vit = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0, **SIZES).state_dict()
    if kind == "resnet":
        torch.save({"conv1.weight": torch.zeros(2, 3, 1, 1), "fc.weight": torch.zeros(2)}, file)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, file)
    elif kind == "code":
        torch.save({"model": vit, "config": Path("/x")}, file)
    elif kind == "cut short":
        torch.save(vit, file)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "not square":
        torch.save({**vit, "pos_embed": torch.zeros(1, 16, 32)}, file)
    elif kind == "bert":
        sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        BertModel(BertConfig(**sizes, intermediate_size=8)).save_pretrained(folder)
        return folder
    elif kind == "timm folder":
        timm.models.save_for_hf(timm.create_model("vit_base_patch16_224", **SIZES), str(folder))
        return folder
    elif kind == "empty folder":
        return folder
    return file


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("missing", r"weights.pt: no such file; correct the path$"),
        ("resnet", r"no image encoder with class token in its 2 tensors \(first 'conv1.weight'\); give a CLIP"),
        ("no tensors", r"no state dict in it; give a file of names and tensors$"),
        ("code", r"holds objects other than tensors, .* keep its weights: torch\.save"),
        ("cut short", r"cannot be read: .*; fetch it again$"),
        ("not square", r"position embeddings of 16 tokens are not \[CLS\] and a square of patches"),
        ("bert", r"holds a model of type 'bert'; give a CLIP, or a file of weights$"),
        ("timm folder", r"a folder of timm's; give its model\.safetensors$"),
        ("empty folder", r"cannot be loaded: "),
    ],
)
def test_sources_that_cannot_be_used(kind: str, line: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    with pytest.raises(UserError, match=line) as error:
        started(config("vit_base_patch16_224", path))
    assert str(error.value).startswith(f"model.image_weights={path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"embed_dim": 48},
            r"patch_embed\.proj\.weight is 32 × 3 × 8 × 8 there and 48 × 3 × 8 × 8 in the model; choose",
        ),
        ({"depth": 3}, r"2 blocks there and 3 in the model; choose .*: width 32, 2 blocks, patches of 8 pixels$"),
        ({"patch_size": 16}, r"patch_embed\.proj\.weight is 32 × 3 × 8 × 8 there and 32 × 3 × 16 × 16 in the model"),
        ({"mlp_ratio": 2}, r"blocks\.0\.mlp\.fc1\.weight is 128 × 32 there and 64 × 32 in the model; choose"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict, line: str, tmp_path: Path) -> None:
    torch.save(openai_clip.Clip().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(UserError, match=line):
        started(config(QUICK, tmp_path / "clip.pt", **changes))


def test_timm_is_not_asked_for_weights(tmp_path: Path) -> None:
    """image_weights wins over image_pretrained, for which there is no network here."""
    torch.save(varied(openai_clip.Clip()).state_dict(), tmp_path / "clip.pt")
    settings = config(f"{QUICK}.openai", tmp_path / "clip.pt").model_copy(update={"image_pretrained": True})
    assert len(started(settings)[1].loaded) > 20
    with pytest.raises(UserError, match="hub cannot be reached"):
        SaclModel(settings.model_copy(update={"image_weights": None}), 50, pretrained=True)
