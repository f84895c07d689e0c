"""The text encoder's and the whole model's starts: outputs as the originals', all reported, errors in one line."""

from pathlib import Path

import albef
import pytest
import timm
import tiny
import torch
from albef import VOCABULARY, Albef, bert_config
from tiny import varied
from torch import nn
from transformers import BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from sacl_ds.config import ModelConfig, RunConfig
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import CONFIG, TOKENIZER, WEIGHTS, load_model, save_weights
from sacl_ds.model.starts.report import SourceReport, StartReport, grouped
from sacl_ds.model.starts.start import load_starts, tokenizer_source, with_positions

CROSS = "fusion_encoder.encoder.layer.{0..1}.crossattention.* (20)"


def config(**changes: object) -> ModelConfig:
    sizes = {"text_layers": albef.TEXT_LAYERS, "fusion_layers": albef.LAYERS - albef.TEXT_LAYERS}
    vision = {"image_encoder": albef.VIT, "image_encoder_arguments": albef.SIZES}
    return ModelConfig.model_validate({**tiny.config().model.model_dump(), **sizes, **vision, **changes})


def started(settings: ModelConfig, vocabulary: int = VOCABULARY) -> tuple[SaclModel, StartReport]:
    settings = with_positions(settings)
    torch.manual_seed(0)
    model = SaclModel(settings, vocabulary, pretrained=True).eval()
    return model, load_starts(model, settings)


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


@torch.no_grad()
def same_text(model: SaclModel, bert: BertModel, atol: float = 1e-5) -> None:
    """The text encoder is BERT's lower layers, and text and fusion without the image are all of BERT."""
    ids, mask = captions()
    states = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    text, _ = model.encode_text(ids, mask)
    shown = mask.bool()
    torch.testing.assert_close(text[shown], states[albef.TEXT_LAYERS][shown], rtol=0, atol=atol)
    taken = [(layer, layer.crossattention) for layer in model.fusion_encoder.encoder.layer]
    for layer, _ in taken:
        layer.crossattention, layer.is_decoder = nn.Identity(), False
    fused = model.fuse(text, mask, torch.zeros(2, 1, 32))
    for layer, crossattention in taken:
        layer.crossattention, layer.is_decoder = crossattention, True
    torch.testing.assert_close(fused[shown], states[-1][shown], rtol=0, atol=atol)


@pytest.mark.parametrize("head", [True, False])
def test_a_bert_folder(head: bool, tmp_path: Path) -> None:
    """With the MLM head and without: then the head is the model's own, new one."""
    original = varied((BertForMaskedLM if head else BertModel)(bert_config(max_position_embeddings=40)))
    original.save_pretrained(tmp_path)
    settings = config(text_encoder=str(tmp_path))
    model, report = started(settings)
    same_text(model, original.bert if head else original)
    torch.manual_seed(0)
    untouched = SaclModel(with_positions(settings), VOCABULARY, pretrained=False).mlm_head
    ids, mask = captions()
    if head:
        with torch.no_grad():
            states = original.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = model.token_logits(states.flatten(0, 1))
            expected = original.cls(states).flatten(0, 1)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    else:
        assert all(torch.equal(a, b) for a, b in zip(model.mlm_head.parameters(), untouched.parameters(), strict=True))
    (source,) = report.sources
    new = grouped(report.new_in(source), report.tensors)
    assert new == [CROSS, *([] if head else ["mlm_head.* (5)"])]
    assert set(source.left_over) == (set() if head else {"pooler.dense.weight", "pooler.dense.bias"})
    assert model.text_encoder.bert.config.max_position_embeddings == 40


@pytest.mark.parametrize(
    ("bert", "changes", "line"),
    [
        (
            {},
            {"text_width": 48},
            r"is 50 × 24 there and 50 × 48 in the model; set model\.text_width=24 and model\.text_h",
        ),
        ({}, {"text_heads": 4}, r"2 heads there and 4 in the model; set model\.text_heads=2$"),
        (
            {},
            {"fusion_layers": 3},
            r"has 4 layers, and .* is 5; set e\.g\. model\.text_layers=2 model\.fusion_layers=2$",
        ),
        ({"vocab_size": 60}, {}, r"embeddings of 60 tokens there, and the tokenizer has 50; give the tokenizer that"),
        ({}, {"max_positions": 64}, r"512 positions there and 64 in the model; set model\.max_positions=512$"),
        (
            {"max_position_embeddings": 8},
            {},
            r"model\.max_tokens=12: the text encoder has 8 positions; set model.max_to",
        ),
        ({"hidden_act": "relu"}, {}, r"trained with relu, layers here compute gelu; give another$"),
        (
            {"intermediate_size": 48},
            {},
            r"intermediate\.dense\.weight is 48 × 24 there and 96 × 24 in the model; give a",
        ),
    ],
)
def test_a_bert_of_another_size(bert: dict, changes: dict, line: str, tmp_path: Path) -> None:
    BertForMaskedLM(bert_config(**bert)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=line) as error:
        started(config(text_encoder=str(tmp_path), **changes))
    assert "\n" not in str(error.value)


def test_what_is_no_bert(tmp_path: Path) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    RobertaModel(RobertaConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path / "roberta")
    with pytest.raises(UserError, match=r"holds a model of type 'roberta'; give a BERT$"):
        started(config(text_encoder=str(tmp_path / "roberta")))
    with pytest.raises(UserError, match="no such folder"):
        started(config(text_encoder=str(tmp_path / "nothing")))


def test_other_norms_are_told(tmp_path: Path) -> None:
    BertForMaskedLM(bert_config(layer_norm_eps=1e-5)).save_pretrained(tmp_path)
    _, report = started(config(text_encoder=str(tmp_path)))
    assert report.sources[0].notes == ("norms have eps 1e-05 there and 1e-12 in the model",)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What model.text_encoder names beside an ALBEF: read for its positions and tokenizer alone."""
    folder = tmp_path_factory.mktemp("bert")
    bert_config().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_albefs_checkpoint(fine_tuned: bool, bert_folder: Path, tmp_path: Path) -> None:
    original = Albef()
    torch.save(original.checkpoint(fine_tuned), tmp_path / "ALBEF.pth")
    model, report = started(config(start=str(tmp_path / "ALBEF.pth"), text_encoder=str(bert_folder)))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids, mask = captions()
    with torch.no_grad():
        expected = original.vit.forward_features((images - model.image_encoder.mean) / model.image_encoder.std)
        states, features = model.encode_image(images)
        tokens = states.tokens
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        projected = tokens[:, 0] @ original.heads["vision_proj.weight"].T
        torch.testing.assert_close(features, nn.functional.normalize(projected, dim=1))
        states, features = model.encode_text(ids, mask)
        projected = states[:, 0] @ original.heads["text_proj.weight"].T
        torch.testing.assert_close(features, nn.functional.normalize(projected, dim=1))
        fused = model.fuse(states, mask, tokens)
        head = nn.functional.linear(fused[:, 0], original.heads["itm_head.weight"], original.heads["itm_head.bias"])
        torch.testing.assert_close(model.match_logits(fused), head)
    same_text(model, original.bert.bert)
    torch.testing.assert_close(model.logit_scale(), torch.tensor(16.0))
    (source,) = report.sources
    assert report.new == ([] if not fine_tuned else [name for name in report.tensors if name.startswith("mlm_head")])
    text = str(report)
    tensors = len(original.vit.state_dict())
    for part in (f"visual_encoder_m.* ({tensors})", "image_queue", "vision_proj.bias", "text_proj.bias", "queue_ptr"):
        assert part in text
    assert "projections have no bias here" in source.notes[0]
    untied = {"text_encoder.cls.predictions.decoder.weight", "text_encoder.cls.predictions.decoder.bias"}
    assert not untied & set(source.left_over)


def test_albefs_fusion_reads_the_image_as_bert_with_cross_attention_does(bert_folder: Path, tmp_path: Path) -> None:
    original = Albef()
    torch.save(original.checkpoint(), tmp_path / "ALBEF.pth")
    model, _ = started(config(start=str(tmp_path / "ALBEF.pth"), text_encoder=str(bert_folder)))
    ids, mask = captions()
    image = torch.randn(2, 5, 32)
    with torch.no_grad():
        fused = model.fuse(model.encode_text(ids, mask)[0], mask, image)
        states = original.bert.bert(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        for own, crossed in zip(
            original.bert.bert.encoder.layer[2:], original.crossed.bert.encoder.layer[2:], strict=True
        ):
            away = (1.0 - mask[:, None, None, :].float()) * -1e9
            attended = own.attention(states, away)[0]
            states = read(crossed.crossattention, attended, image)
            states = own.output(own.intermediate(states), states)
    torch.testing.assert_close(fused[mask.bool()], states[mask.bool()], rtol=0, atol=1e-5)


def read(cross: nn.Module, states: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """BERT's cross-attention, written out: two heads of 12."""
    query, key, value = cross.self.query(states), cross.self.key(image), cross.self.value(image)
    query, key, value = (x.view(2, -1, 2, 12).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(2, 3) / 12**0.5).softmax(dim=-1)
    return cross.output((weights @ value).transpose(1, 2).reshape(2, -1, 24), states)


@pytest.mark.parametrize(("temperature", "scale"), [(2.0, 1.0), (0.001, 100.0), (0.05, 20.0)])
def test_albefs_temperature(temperature: float, scale: float, bert_folder: Path, tmp_path: Path) -> None:
    made = Albef().checkpoint()
    made["model"]["temp"] = torch.tensor(temperature)
    torch.save(made, tmp_path / "ALBEF.pth")
    model, _ = started(config(start=str(tmp_path / "ALBEF.pth"), text_encoder=str(bert_folder)))
    torch.testing.assert_close(model.logit_scale.log_scale.exp(), torch.tensor([scale]))


@pytest.mark.parametrize("source", ["albef", "run"])
def test_a_start_at_another_resolution(source: str, bert_folder: Path, tmp_path: Path) -> None:
    if source == "albef":
        original = Albef()
        before = original.vit.pos_embed.detach()
        torch.save(original.checkpoint(), tmp_path / "ALBEF.pth")
        start = {"start": str(tmp_path / "ALBEF.pth"), "text_encoder": str(bert_folder)}
    else:
        original = finished_run(tmp_path)
        before, start = original.image_encoder.vit.pos_embed.detach(), {"start": str(tmp_path)}
    words = 50 if source == "albef" else Tokenizer.load(tmp_path / TOKENIZER, 12).size
    model, report = started(config(image_size=64, **start), words)
    grid = before[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    expected = torch.cat([before[:, :1], resized.reshape(1, 64, 32)], dim=1)
    torch.testing.assert_close(model.image_encoder.vit.pos_embed.detach(), expected)
    assert "position embeddings interpolated from 4 × 4 patches to 8 × 8" in report.sources[0].notes


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"text_encoder": None}, r"goes with BERT's vocabulary; set model\.text_encoder to that BERT"),
        (
            {"text_layers": 1, "fusion_layers": 3},
            r"image from layer 2 on; .* is 1; set model\.text_layers=2 model\.fusion",
        ),
        ({"embed_dim": 8}, r"image_projection\.weight is 16 × 32 there and 8 × 32 .*; set model\.embed_dim=16$"),
        (
            {"image_encoder": "vit_base_patch16_clip_quickgelu_224"},
            r"trained with gelu, .* computes quick_gelu; set model",
        ),
        ({"text_width": 48}, r"is 50 × 24 there and 50 × 48 in the model; set model\.text_width=24"),
    ],
)
def test_an_albef_that_does_not_fit(changes: dict, line: str, bert_folder: Path, tmp_path: Path) -> None:
    torch.save(Albef().checkpoint(), tmp_path / "ALBEF.pth")
    values = {"start": str(tmp_path / "ALBEF.pth"), "text_encoder": str(bert_folder), **changes}
    with pytest.raises(UserError, match=line) as error:
        started(config(**values))
    assert str(error.value).startswith(f"model.start={tmp_path}/ALBEF.pth")
    assert "\n" not in str(error.value)


def test_starts_that_are_none(bert_folder: Path, tmp_path: Path) -> None:
    torch.save({"visual.x": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"no ALBEF in it, among 1 tensors from 'visual\.x' on; give its visual_encoder"
    ):
        started(config(start=str(tmp_path / "other.pth"), text_encoder=str(bert_folder)))
    with pytest.raises(UserError, match=r"no config\.yaml there; give the directory of a finished run$"):
        started(config(start=str(tmp_path)))
    with pytest.raises(UserError, match=r"no such file or folder; correct the path$"):
        started(config(start=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"leave out one of the two"):
        config(start="x", image_weights="y")
    finished_run(tmp_path)
    with pytest.raises(UserError, match="weights of a run of ours; give the directory that they are in"):
        started(config(start=str(tmp_path / WEIGHTS), text_encoder=str(bert_folder)))


def finished_run(folder: Path) -> SaclModel:
    """A run's directory with a small vocabulary and 20 positions; its model."""
    tokenizer = Tokenizer(train_wordpiece(["a red circle", "blue squares and rings of yellow"] * 3, 50), 12)
    run = RunConfig(model=config(max_positions=20))
    model = varied(SaclModel(run.model, tokenizer.size, pretrained=False))
    tokenizer.save(folder / TOKENIZER)
    save_weights(model.state_dict(), folder, 3)
    run.save(folder / CONFIG)
    return model


def test_a_finished_run(tmp_path: Path) -> None:
    original = finished_run(tmp_path)
    settings = config(start=str(tmp_path))
    words = original.text_encoder.bert.embeddings.word_embeddings.weight
    model, report = started(settings, len(words))
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not report.new
    assert not report.sources[0].left_over
    assert tokenizer_source(settings) == (tmp_path / TOKENIZER, "model.start")
    with pytest.raises(UserError, match=r"a model with model\.embed_dim=16, not 8; set model\.embed_dim=16$"):
        started(config(start=str(tmp_path), embed_dim=8), len(words))
    arguments = {**albef.SIZES, "embed_dim": 64}
    with pytest.raises(UserError, match=r"set model\.image_encoder and model\.image_size as in .*config\.yaml$"):
        started(config(start=str(tmp_path), image_encoder_arguments=arguments), len(words))


def test_a_finished_run_needs_its_sources_no_more(tmp_path: Path) -> None:
    original = varied(BertForMaskedLM(bert_config(max_position_embeddings=40)))
    original.save_pretrained(tmp_path / "bert")
    settings = with_positions(config(text_encoder=str(tmp_path / "bert")))
    tokenizer = Tokenizer(train_wordpiece(["a red circle", "blue squares and rings of yellow"] * 3, 50), 12)
    model = SaclModel(settings, tokenizer.size, pretrained=False)
    folder = tmp_path / "run"
    tokenizer.save(folder / TOKENIZER)
    save_weights(model.state_dict(), folder, 3)
    gone = {"text_encoder": "/nowhere/bert", "image_weights": "/nowhere/clip.pt", "image_pretrained": True}
    RunConfig(model=settings.model_copy(update=gone)).save(folder / CONFIG)
    loaded, _, _ = load_model(folder, "teacher.checkpoint")
    assert loaded.text_encoder.bert.embeddings.position_embeddings.weight.shape == (40, 24)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_weights_that_timm_loads_are_reported(tmp_path: Path) -> None:
    vit = timm.create_model(albef.VIT, img_size=32, num_classes=0, **albef.SIZES)
    timm.models.save_for_hf(vit, str(tmp_path), model_args={"img_size": 32, **albef.SIZES}, safe_serialization=True)
    name = f"local-dir:{tmp_path}"
    model, report = started(config(image_encoder=name, image_encoder_arguments={}, image_pretrained=True))
    assert torch.equal(model.image_encoder.vit.pos_embed, vit.pos_embed)
    (source,) = report.sources
    assert (source.setting, source.source) == ("model.image_encoder", name)
    assert not [name for name in report.new if name.startswith("image_encoder.")]
    _, report = started(config())
    assert report.sources == []


def test_names_are_grouped_without_a_lie() -> None:
    layers = [f"encoder.layer.{n}.{part}.{kind}" for n in range(3) for part in ("a", "b") for kind in ("w", "c")]
    everything = [*layers, "head.w", "head.c", "scale"]
    assert grouped(everything, everything) == ["encoder.* (12)", "head.* (2)", "scale"]
    without = [name for name in everything if name != "encoder.layer.1.b.c"]
    assert grouped(without, everything) == [
        "encoder.layer.{0..2}.a.* (6)",
        "encoder.layer.{0..2}.b.w (3)",
        "encoder.layer.{0,2}.b.c (2)",
        "head.* (2)",
        "scale",
    ]
    assert grouped(["encoder.layer.1.b.c"], everything) == ["encoder.layer.1.b.c"]


def test_the_reports_text() -> None:
    names = ["a.0.w", "a.1.w", "b.w", "c.w"]
    source = SourceReport("model.x", "/file", ("a.", "b."), ["a.0.w", "a.1.w"], ["old.w"], ["m.0", "old.w"], ("said",))
    assert str(StartReport(names, [source])).splitlines() == [
        "start: 2 of 4 tensors loaded, 2 new",
        "model.x=/file",
        "  loaded, 2: a.* (2)",
        "  new, 1: b.w",
        "  left over, 1: old.w",
        "  note: said",
        "no source",
        "  new, 1: c.w",
    ]
