"""Weights in every layout that libraries write, wrapped and nested: loaded equal to their source, or one error line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import albef
import openai_clip
import pytest
import timm
import tiny
import torch
from albef import VOCABULARY, Albef, bert_config
from clips import clip_folder
from documented import assert_documented
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import is_one_line
from safetensors.torch import load_file, save_file
from saved import saved_run
from tiny import varied
from torch import Tensor
from transformers import BertForMaskedLM

import sacl_ds
from sacl_ds.config import ModelConfig
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.starts.start import load_starts, with_positions
from sacl_ds.model.teacher import load_teacher
from sacl_ds.tasks.configuration import finetune_config, starting_model, task_tokenizer

State = dict[str, Tensor]
CLIP_VIT = "vit_base_patch16_clip_quickgelu_224"
LAYERS = ("layers.0.", "layer.1.", "blocks.0.", "resblocks.1.")
# what libraries put into names: of all of them, or of each layer that they wrap by itself
WRAPPERS: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: inside(name, "_orig_mod."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{inside(name, '_fsdp_wrapped_module.')}",
    "recomputed layers": lambda name: inside(name, "_checkpoint_wrapped_module."),
}
HEADS = ("image_projection", "text_projection", "logit_scale", "matching_head", "mlm_head")
NESTS = ("state_dict", "model", "module", "model_state_dict")


def inside(name: str, part: str) -> str:
    for layer in LAYERS:
        name = name.replace(layer, layer + part)
    return name


def blip() -> State:
    """BLIP's names: every layer of its text encoder reads the image."""
    state: State = {
        name.replace("text_encoder.bert.", "text_encoder."): value
        for name, value in Albef().checkpoint()["model"].items()  # type: ignore[attr-defined]
        if "_m." not in name and ".cls." not in name
    }
    for layer in (0, 1):
        state |= {
            n.replace("layer.2.", f"layer.{layer}."): t for n, t in state.items() if "layer.2.crossattention" in n
        }
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layouts")
    (made / "clip").mkdir()
    clip_folder(made / "clip")
    varied(BertForMaskedLM(bert_config())).save_pretrained(made / "bert")
    saved_run(made / "run", 1, teacher=False)
    return made


@pytest.fixture(scope="module")
def states(folder: Path) -> dict[str, State]:
    """Weights by the library whose layout they have."""
    timm_vit = timm.create_model(albef.VIT, img_size=32, num_classes=5, **albef.SIZES)
    return {
        "transformers' CLIP": load_file(folder / "clip/model.safetensors"),
        "transformers' BERT": load_file(folder / "bert/model.safetensors"),
        "timm": varied(timm_vit).state_dict(),
        "open_clip": varied(openai_clip.Clip()).state_dict(),
        "ALBEF": Albef().checkpoint()["model"],  # type: ignore[dict-item]
        "BLIP": blip(),
        "ours": load_file(folder / "run/model.safetensors"),
    }


def config(vit: str, **changes: object) -> ModelConfig:
    sizes = {"text_layers": albef.TEXT_LAYERS, "fusion_layers": albef.LAYERS - albef.TEXT_LAYERS}
    vision = {"image_encoder": vit, "image_encoder_arguments": albef.SIZES}
    return ModelConfig.model_validate({**tiny.config().model.model_dump(), **sizes, **vision, **changes})


def started(model: ModelConfig) -> State:
    model = with_positions(model)
    torch.manual_seed(0)
    made = SaclModel(model, VOCABULARY, pretrained=True)
    load_starts(made, model)
    return made.state_dict()


def copied(folder: Path, original: str, weights: Path) -> Path:
    """The folder `original` with other weights."""
    to = folder / f"{original} with others"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder / original, to, ignore=shutil.ignore_patterns("model.safetensors"))
    name = "model.safetensors" if weights.suffix == ".safetensors" or original == "run" else "pytorch_model.bin"
    shutil.copy(weights, to / name)
    return to


def fine_tuned(run: Path) -> State:
    asked = finetune_config("retrieval", None, [f"checkpoint={run}"])
    tokenizer = task_tokenizer(asked)
    assert tokenizer
    return starting_model(asked, tokenizer, resume=False)[0].state_dict()


PLACES: dict[str, Callable[[Path, Path], State]] = {
    "teacher": lambda folder, file: state_of(load_teacher(str(copied(folder, "clip", file)), torch.device("cpu"))),
    "start": lambda folder, file: started(config(albef.VIT, start=str(file), text_encoder=str(folder / "bert"))),
    "image_weights, ViT": lambda _, file: image(started(config(albef.VIT, image_weights=str(file)))),
    "image_weights, CLIP": lambda _, file: image(started(config(CLIP_VIT, image_weights=str(file)))),
    "image_weights, folder": lambda folder, file: image(
        started(config(CLIP_VIT, image_weights=str(copied(folder, "clip", file))))
    ),
    "text_encoder": lambda folder, file: started(config(albef.VIT, text_encoder=str(copied(folder, "bert", file)))),
    "checkpoint": lambda folder, file: fine_tuned(copied(folder, "run", file)),
    "sacl_ds.load": lambda folder, file: sacl_ds.load(copied(folder, "run", file), "cpu").model.state_dict(),
}
TAKES = {  # what a place is there for
    "teacher": ("transformers' CLIP",),
    "start": ("ALBEF",),
    "image_weights, ViT": ("timm", "ALBEF", "BLIP"),
    "image_weights, CLIP": ("transformers' CLIP", "open_clip"),
    "image_weights, folder": ("transformers' CLIP",),
    "text_encoder": ("transformers' BERT",),
    "checkpoint": ("ours",),
    "sacl_ds.load": ("ours",),
}


def state_of(teacher: Any) -> State:
    return dict(teacher.model.state_dict())


def image(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith("image_encoder.")}


def written(folder: Path, state: State, nests: list[str], safe: bool) -> Path:
    """The file of a state dict that lies in others, of safetensors where they can hold it."""
    if safe and not nests:
        tensors = {name: value.clone().contiguous() for name, value in state.items()}  # none shares another's memory
        save_file(tensors, folder / "w.safetensors", {"format": "pt"})
        return folder / "w.safetensors"
    content: Any = state
    for nest in nests:
        content = {"epoch": 3, nest: content, "steps": torch.tensor(7)}
    torch.save(content, folder / "w.pt")
    return folder / "w.pt"


def outcome(load: Callable[[Path, Path], State], folder: Path, file: Path) -> State | None:
    """What is loaded; None where one line refuses it."""
    try:
        return load(folder, file)
    except UserError as error:
        assert is_one_line(error)
        return None


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("place", PLACES)
def test_wrapped_and_nested(place: str, folder: Path, states: dict[str, State]) -> None:
    """What a place is for is loaded whatever wraps it, equal to the bare weights; of a run of ours, or refused."""
    load = PLACES[place]
    bare = {layout: outcome(load, folder, written(folder, states[layout], [], True)) for layout in TAKES[place]}
    if place == "teacher":
        assert equal(bare["transformers' CLIP"] or {}, states["transformers' CLIP"])

    @settings(max_examples=8)
    @given(
        st.sampled_from(TAKES[place]),
        st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3),
        st.lists(st.sampled_from(NESTS), max_size=2, unique=True),
        st.booleans(),
    )
    def check(layout: str, wrappers: list[str], nests: list[str], safe: bool) -> None:
        state = states[layout]
        for wrapper in wrappers:
            state = {WRAPPERS[wrapper](name): value for name, value in state.items()}
        found = outcome(load, folder, written(folder, state, nests, safe))
        expected = bare[layout]
        assert expected is not None
        if layout == "ours":
            assert found is None or equal(found, expected)
        else:
            assert found is not None
            assert equal(found, expected)

    check()


@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_given(place: str, folder: Path, states: dict[str, State]) -> None:
    """Any layout, a tensor lost, unknown beginnings of names: never a number that is not the source's."""
    load = PLACES[place]
    bare = {layout: outcome(load, folder, written(folder, states[layout], [], True)) for layout in states}
    foreign = {layout for layout, found in bare.items() if found and layout not in TAKES[place]}
    if not place.startswith("image_weights"):
        assert not foreign

    @settings(max_examples=8)
    @given(st.sampled_from(sorted(states)), st.data(), st.sampled_from(["", "net.", "model.module.", "module.model."]))
    def check(layout: str, data: st.DataObject, prefix: str) -> None:
        lost = data.draw(st.sampled_from([None, *sorted(states[layout])]))
        state = {f"{prefix}{name}": value for name, value in states[layout].items() if name != lost}
        found, expected = outcome(load, folder, written(folder, state, [], False)), bare[layout]
        if found is not None and layout != "ours":
            assert expected is not None
            told = HEADS if place in ("start", "text_encoder") else ()  # what the start report names as new
            assert all(torch.equal(found[name], expected[name]) for name in found if not name.startswith(told))

    check()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(place: str, number: float, folder: Path, states: dict[str, State]) -> None:
    layout = TAKES[place][0]
    state = {name: value.clone() for name, value in states[layout].items()}
    used = next(name for name in state if name.endswith(("blocks.0.mlp.fc1.weight", "0.intermediate.dense.weight",
                                                         "vision_model.encoder.layers.0.mlp.fc1.weight")))  # fmt: skip
    state[used].view(-1)[3] = number
    with pytest.raises(UserError, match="holds numbers that are not finite; give weights that are whole") as error:
        PLACES[place](folder, written(folder, state, [], True))
    assert is_one_line(error.value)


def test_temperatures_that_are_none(folder: Path, states: dict[str, State]) -> None:
    clip, whole = states["transformers' CLIP"], states["ALBEF"]
    broken = {**clip, "logit_scale": torch.tensor(float("nan"))}
    with pytest.raises(UserError, match="logit_scale holds numbers that are not finite"):
        PLACES["teacher"](folder, written(folder, broken, [], True))
    for temperature in (float("nan"), 0.0, -0.07, float("inf")):
        with pytest.raises(UserError, match=r"its temp is .*, no temperature; give weights that are whole"):
            PLACES["start"](folder, written(folder, {**whole, "temp": torch.tensor(temperature)}, [], True))


def test_the_documented_lines(folder: Path, states: dict[str, State]) -> None:
    for state in (states["BLIP"], {**states["ALBEF"], "temp": torch.tensor(-1.0)}):
        with pytest.raises(UserError) as error:
            PLACES["start"](folder, written(folder, state, [], True))
        assert_documented(f"error: {error.value}".replace(str(folder), "/data"))


def test_weights_that_timm_fetches_are_all_there(tmp_path: Path) -> None:
    """Without a classifier timm loads what there is, and leaves the rest at chance."""
    vit = timm.create_model(albef.VIT, img_size=32, num_classes=5, **albef.SIZES)
    timm.models.save_for_hf(vit, str(tmp_path), model_args={"img_size": 32, **albef.SIZES}, safe_serialization=True)
    asked = config(f"local-dir:{tmp_path}", image_encoder_arguments={}, image_pretrained=True)
    whole = load_file(tmp_path / "model.safetensors")
    for state, line in (
        ({f"net.{name}": value for name, value in whole.items()}, r"it lacks .* more of the model's tensors"),
        ({name: value for name, value in whole.items() if name != "norm.bias"}, r"it lacks norm\.bias of the model's"),
        (whole | {"norm.bias": torch.full((32,), float("nan"))}, r"norm\.bias holds numbers that are not finite"),
    ):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=line) as error:
            started(asked)
        assert is_one_line(error.value)
    for prefix in ("", "_orig_mod.", "module."):
        save_file({f"{prefix}{name}": value for name, value in whole.items()}, tmp_path / "model.safetensors")
        found = started(asked)
        assert all(
            torch.equal(found[f"image_encoder.vit.{name}"], whole[name]) for name in whole if "head." not in name
        )
