"""What a user can do wrong in a configuration: one line that names the key, the place and the way out."""

import json
from pathlib import Path

import pytest
from documented import assert_documented
from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.config import RunConfig
from sacl_ds.config_file import load_config
from sacl_ds.ds_config import read_ds_config, resolve
from sacl_ds.errors import UserError
from sacl_ds.machine import Machine


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.stepz=5"], ["unknown key 'train.stepz'", "'train.stepz=5'", "did you mean 'train.steps'?"]),
        (["steps=5"], ["unknown key 'steps'", "did you mean 'train.steps' or 'teacher.steps'?"]),
        (["losses.sharpness=5"], ["unknown key 'losses'", "did you mean 'loss'"]),
        (["model.patchsize=5"], ["unknown key 'model.patchsize'"]),
        (["train.steps=many"], ["train.steps", "valid integer", "'many'"]),
        (["train.steps=true"], ["train.steps in argument 'train.steps=true'", "a number", "not True"]),
        (["loss.sharpness=no"], ["loss.sharpness", "a number", "not False"]),
        (["train.save_every=on"], ["train.save_every", "a number", "not True"]),
        (["optim.betas=[0.9, yes]"], ["optim.betas", "a number", "not [0.9, True]"]),
        (["train.steps=1:30"], ["train.steps", "valid integer", "'1:30'"]),
        (["loss.sharpness=1:30.5"], ["loss.sharpness", "valid number", "'1:30.5'"]),
        (["train.steps=-5"], ["train.steps", "greater than or equal to 0", "-5"]),
        (["data.source=coco"], ["data.source", "'scenes' or 'shards'", "'coco'"]),
        (["data.source=shards"], ["data.source=shards needs data.shards"]),
        (["data.augment=crop"], ["falsify the captions of scenes"]),
        (["loss.false_share=0.1", "teacher.steps=0"], ["loss.false_share=0.1 needs a teacher"]),
        (["loss.false_share=1"], ["loss.false_share=1.0: a share between 0 and 1, or null"]),
        (["model.preset=huge"], ["model.preset", "'tiny' or 'base'"]),
        (["momentum.decay=1"], ["momentum.decay", "less than 1"]),
        (["momentum.queue_size=-1"], ["momentum.queue_size", "greater than or equal to 0"]),
        (["momentum.distill_weight=1.5"], ["momentum.distill_weight", "less than or equal to 1"]),
        (["loss.alpha_end=2"], ["loss.alpha_end", "less than or equal to 1"]),
        (["nonsense"], ["'nonsense'", "key=value"]),
        (["train=5"], ["train", "in argument 'train=5'"]),
    ],
)
def test_bad_overrides(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {stepss: 4}", ["unknown key 'train.stepss'", "run.yaml", "'train.steps'"]),
        ("train: [1", ["run.yaml line", "not valid YAML"]),
        ("- 1", ["run.yaml", "mapping"]),
        ("train: {steps: yes}", ["train.steps in", "run.yaml", "a number", "not True"]),
        ("train:\n  steps: 1:30", ["run.yaml line 2", "1:30 is a number of base 60; write it with base 10"]),
        ("loss:\n  sharpness: 1:30.5", ["run.yaml line 2", "1:30.5 is a number of base 60"]),
        ("seed: 010", ["run.yaml line 1", "010 is a number of base 8; write it with base 10, or '010' for a text"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(file, [])
    for part in parts:
        assert part in str(error.value)
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml", [])


def test_what_yaml_makes_of_a_number_is_documented(tmp_path: Path) -> None:
    for text, overrides in (("train:\n  steps: 1:30\n", []), ("seed: 010", []), (None, ["train.steps=true"])):
        file = tmp_path / "run.yaml" if text else None
        if file:
            file.write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(file, overrides)
        assert_documented(f"error: {caught.value}".replace(str(tmp_path), "/data"))


def test_layers_and_the_saved_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {text_layers: 3}\ntrain: {steps: 7}\n")
    run = load_config(file, ["train.steps=9", "optim.lr_text=3e-4", "data.shards=null", "model.image_size=96"])
    assert (run.train.steps, run.model.text_layers, run.model.text_width) == (9, 3, 128)
    assert run.optim.lr_text == 3e-4
    run.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []) == run


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4),
        max_size=3,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_mapping_is_valid_or_a_user_error(values: dict) -> None:
    for room in ("train", "loss", "data"):
        arguments = [f"{room}.{key}={json.dumps(value)}" for key, value in values.items()]
        try:
            assert isinstance(load_config(None, arguments), RunConfig)
        except UserError as error:
            assert "\n" not in str(error).replace("\\n", "")


def test_the_paper_and_its_baseline_differ_in_the_loss_alone(root: Path) -> None:
    sacl, albef = (load_config(root / f"launch/configs/{name}.yaml", []) for name in ("sacl", "albef"))
    assert (sacl.loss.contrastive, albef.loss.contrastive) == ("sacl", "infonce")
    assert sacl.model_dump(exclude={"loss"}) == albef.model_dump(exclude={"loss"})
    momentum = sacl.momentum
    assert (momentum.enabled, momentum.decay, momentum.queue_size, momentum.distill_weight) == (True, 0.995, 65536, 0.4)


CPU = Machine("cpu", "this cpu", bf16=True, fp16=False, apex="none", cannot_compile=None)
GPU = Machine("cuda", "My GPU", bf16=True, fp16=True, apex="none", cannot_compile=None)


def engine(ds: dict, *overrides: str, world: int = 2, machine: Machine = CPU) -> dict:
    return resolve(ds, load_config(None, list(overrides)), world, machine, name="my.json", folder="run").values


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_files_resolve(root: Path, stage: int) -> None:
    ds = read_ds_config(root / f"ds_configs/zero{stage}.json")
    out = engine(ds, "train.global_batch_size=64", "optim.lr_text=0.002", "train.precision=bf16")
    assert '"auto"' not in json.dumps(out)
    assert (out["train_batch_size"], out["train_micro_batch_size_per_gpu"]) == (64, 32)
    assert out["gradient_accumulation_steps"] == 1
    assert out["optimizer"]["params"] == {
        "lr": 0.002, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True, "fused": True
    }  # fmt: skip
    assert out["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert out["zero_optimization"]["stage"] == stage
    assert "torch_autocast" not in engine(ds)


def test_micro_batches_are_deepspeeds_one_batch() -> None:
    """It would end a step by its own count, where the run marks the last micro-batch itself."""
    ds = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4, "train_batch_size": "auto"}
    out = engine(ds, "train.micro_batch_size=16")
    assert (out["train_batch_size"], out["train_micro_batch_size_per_gpu"]) == (128, 64)
    assert out["gradient_accumulation_steps"] == 1
    assert load_config(None, ["train.micro_batch_size=16"]).micro_batches(2) == (16, 4)
    assert load_config(None, []).micro_batches(2) == (64, 1)


def test_fp16_is_autocast_as_well() -> None:
    out = engine({}, "train.precision=fp16", machine=GPU)
    assert out["torch_autocast"] == {"enabled": True, "dtype": "float16"}
    assert "fp16" not in out


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_does_not_go_with_zero(stage: int) -> None:
    with pytest.raises(UserError, match=rf"my\.json: .*stage={stage} clips gradients of fp16 .*bf16 or fp32"):
        engine({"zero_optimization": {"stage": stage}}, "train.precision=fp16", machine=GPU)


@pytest.mark.parametrize(
    ("ds", "overrides", "parts"),
    [
        ({"train_batch_size": 999}, [], ["my.json says train_batch_size=999", "train.global_batch_size is 128"]),
        ({"train_micro_batch_size_per_gpu": 5}, [], ["train_micro_batch_size_per_gpu=5", "is 64"]),
        ({"gradient_accumulation_steps": 4}, [], ["gradient_accumulation_steps=4", "/ train.micro_batch_size is 1"]),
        ({"gradient_accumulation_steps": 2}, ["train.micro_batch_size=16"], ["gradient_accumulation_steps=2", "is 4"]),
        ({"train_micro_batch_size_per_gpu": 64}, ["train.micro_batch_size=16"], ["train.micro_batch_size is 16"]),
        ({"gradient_clipping": 9.0}, [], ["gradient_clipping=9.0", "optim.clip_norm is 1.0"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, [], ["lr=1", "optim.lr_text"]),
        ({"optimizer": {"type": "Lamb"}}, [], ["'Lamb'", "AdamW"]),
        ({"bf16": {"enabled": True}}, [], ["bf16.enabled=true", "train.precision=bf16"]),
        ({"fp16": {"enabled": True}}, [], ["fp16.enabled=true"]),
        ({"torch_autocast": {"enabled": True}}, [], ["enabled=True", "train.precision=fp32"]),
        ({"scheduler": {"type": "WarmupLR"}}, [], ["remove 'scheduler'"]),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            [],
            ["zero_optimization.reduce_bucket_size"],
        ),
        ({}, ["train.global_batch_size=127"], ["127 does not divide over 2 ranks", "128"]),
        ({}, ["train.micro_batch_size=24"], ["=24 does not divide the 64 pairs", "each of 2 ranks; take 16,"]),
        ({}, ["train.micro_batch_size=100"], ["=100 does not divide the 64 pairs", "take 64,"]),
        ({}, ["train.micro_batch_size=1"], ["=1 leaves ITM without negatives", "loss.matching_weight=0"]),
        ({}, ["train.precision=fp16"], ["train.precision=fp16, but this cpu has no fp16; set train.precision=bf16"]),
    ],
)
def test_contradictions(ds: dict, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        engine(ds, *overrides)
    for part in parts:
        assert part in str(error.value), error.value


def test_unreadable_ds_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the DeepSpeed configuration"):
        read_ds_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        read_ds_config(tmp_path / "bad.json")
