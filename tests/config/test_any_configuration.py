"""Whatever stands in a configuration: a valid one, or one line. hypothesis writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sacl_ds.config import RunConfig, TrainingConfig
from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.config_file import load_config
from sacl_ds.config_help import settings as settings_of
from sacl_ds.ds_config import read_ds_config, resolve
from sacl_ds.errors import UserError, one_line
from sacl_ds.machine import Machine
from sacl_ds.tasks.configuration import evaluation_config, finetune_config
from sacl_ds.yaml_files import BadYaml, parse_yaml, plain_yaml

QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CPU = Machine("cpu", "this cpu", bf16=True, fp16=False, apex="none", cannot_compile=None)

numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 2**63, 2**64, 0, -1])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=12) | st.sampled_from(["auto", "none", "on", "~x/y"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
)
keys = st.sampled_from(sorted({each.key for root in (RunConfig, FinetuneConfig) for each in settings_of(root)}))
# YAML as people mistype it, beside what only others would write
texts = st.text(max_size=60) | st.sampled_from(
    [
        "!!python/object/apply:os.system ['touch proof']", "!!python/name:os.system", "!!int ''", "!!float x", "@x",
        "!!bool x", "!!timestamp x", "2001-99-99", "0x" + "f" * 9000, "9" * 5000, "&a [*a]", "*a", "{a: 1, a: 2}", "`",
        "<<: 1", "? [1]: 2", "\ud800", '"\\0"', '"\\uD800"', ".inf", "-.inf", ".nan", "1e999", "0b", "1:99999:99",
        "{" * 200, "[" * 200, "- " * 500, "!!binary /w==", "!!set {a}", "!!omap [a: 1]", "%TAG ! !", "--- a\n--- b",
        "\x85", "a: b: c", "\t",
    ]
)  # fmt: skip


def assert_kept(run: TrainingConfig, folder: Path, root: type[TrainingConfig]) -> None:
    """Saved and read again, it is the same."""
    run.save(folder / "saved.yaml")
    assert root.model_validate(parse_yaml((folder / "saved.yaml").read_text(), "saved")) == run


def assert_line(error: UserError) -> None:
    assert str(error) == one_line(str(error))
    assert 0 < len(str(error)) < 2000


@given(keys, values | texts)
@QUICK
def test_any_value_of_any_setting(tmp_path: Path, key: str, value: Any) -> None:
    """From the command line and from a file."""
    argument = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(nested))
    for file, overrides in ((None, [f"{key}={argument}"]), (tmp_path / "run.yaml", [])):
        try:
            assert_kept(load_config(file, overrides), tmp_path, RunConfig)
        except UserError as error:
            assert_line(error)
        try:
            assert_kept(finetune_config("vqa", str(file) if file else None, overrides), tmp_path, FinetuneConfig)
        except UserError as error:
            assert_line(error)


@given(st.lists(st.text(max_size=30) | st.builds("{}={}".format, st.text(max_size=12) | keys, texts), max_size=3))
@QUICK
def test_any_arguments(tmp_path: Path, arguments: list[str]) -> None:
    for load in (load_config, lambda file, given: finetune_config(None, file, given)):
        try:
            assert isinstance(load(None, arguments), TrainingConfig)
        except UserError as error:
            assert_line(error)


@given(texts | st.builds("{}: {}".format, keys | st.sampled_from(["train", "model", "data", "task"]), texts))
@QUICK
def test_any_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    for load in (load_config, lambda file, given: finetune_config(None, str(file), given)):
        try:
            assert isinstance(load(tmp_path / "run.yaml", []), TrainingConfig)
        except UserError as error:
            assert_line(error)
    assert not Path("proof").exists()


@given(st.dictionaries(st.sampled_from(["task", "data", "model", "seed", "loss", "vqa"]) | scalars, values, max_size=4))
@QUICK
def test_any_run_to_be_evaluated(tmp_path: Path, saved: dict) -> None:
    """Its config.yaml, as a starting point and as what is evaluated."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    for load, task in ((evaluation_config, None), (finetune_config, "nlvr2")):
        try:
            assert isinstance(load(task, None, [f"checkpoint={tmp_path}"]), FinetuneConfig)
        except UserError as error:
            assert_line(error)


@given(texts)
@QUICK
def test_yaml_is_values_or_one_error(text: str) -> None:
    try:
        found = plain_yaml(text)
    except BadYaml as error:
        assert "\n" not in str(error)
    else:
        assert found == yaml.safe_load(text) or found != found  # noqa: PLR0124


def test_yaml_that_would_grow_without_end(tmp_path: Path) -> None:
    """A thousand million values in a kilobyte; anchors within themselves; depth."""
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    deep = "{a: " * 60 + "1" + "}" * 60
    for text, said in (
        (laughs, r"run.yaml line \d+: not valid YAML: more than 100000 values"),
        ("model: &m {image_encoder_arguments: *m}", r"line 1: not valid YAML: an anchor within itself"),
        (f"model: {deep}", "more than 40 levels"),
        ("[" * 100_000, "RecursionError"),
        ("a: 1\n" * 300_000, "more than 1048576 characters"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: not valid YAML: the key 'steps' stands twice"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            load_config(tmp_path / "run.yaml", [])
    assert load_config(None, ["train={steps: &n 7, log_every: *n}"]).train.log_every == 7  # anchors as such are fine


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("loss.sharpness=.inf", "loss.sharpness .*: input should be a finite number"),
        ("optim.lr_image=.nan", "optim.lr_image .*: input should be a finite number"),
        ("seed=18446744073709551616", "seed .*: .*less than 2\\^63|a whole number here is less than 2\\^63"),
        ("train.steps=" + "9" * 5000, "train.steps"),
        ("seed=0x" + "f" * 9000, "a whole number here is less than 2|a number of thousands of digits|seed"),
        ("data.captions.exclude='a{99999999999999999999}'", "is no regular expression"),
        ("model.preset=[tiny]", "model.preset"),
        ("data.weights=[]", "data.weights"),
        (".".join("a" * 100) + "=1", "expected key=value"),
        (
            "model.image_encoder_arguments={a: 2001-01-01}",
            "image_encoder_arguments.a: numbers, texts",
        ),
        ("model.image_encoder_arguments={a: .inf}", "image_encoder_arguments.a: numbers, texts"),
    ],
)
def test_values_that_were_let_through_or_crashed(argument: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        load_config(None, [argument])
    assert_line(error.value)


ROOT = Path(__file__).parents[2]
_FILES = [json.loads((ROOT / f"ds_configs/{name}.json").read_text()) for name in ("zero2", "zero3", "zero3_offload")]
_PLACES = [
    "zero_optimization", "zero_optimization.stage", "zero_optimization.offload_optimizer", "optimizer",
    "optimizer.type",
    "zero_optimization.offload_optimizer.device", "optimizer.params", "optimizer.params.lr", "optimizer.params.betas",
    "optimizer.params.torch_adam", "bf16", "fp16", "fp16.enabled", "torch_autocast", "train_batch_size", "csv_monitor",
    "gradient_clipping", "tensorboard.enabled", "scheduler", "zero_optimization.offload_param.nvme_path", "wandb", "x",
]  # fmt: skip


@given(st.sampled_from(_FILES), st.lists(st.tuples(st.sampled_from(_PLACES), values), min_size=1, max_size=3))
@QUICK
def test_any_deepspeed_file(tmp_path: Path, whole: dict, changes: list[tuple[str, Any]]) -> None:
    ds = json.loads(json.dumps(whole))
    for place, value in changes:
        *sections, last = place.split(".")
        inner = ds
        for section in sections:
            inner = inner.setdefault(section, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[last] = value
    try:
        (tmp_path / "ds.json").write_text(json.dumps(ds))
    except (TypeError, ValueError):  # mappings that JSON cannot spell
        return
    try:
        made = resolve(read_ds_config(tmp_path / "ds.json"), RunConfig(), 2, CPU, name="ds.json")
        assert made.values["train_batch_size"] == RunConfig().train.global_batch_size
        assert "auto" not in json.dumps(made.values["zero_optimization"])
    except UserError as error:
        assert_line(error)


@given(st.binary(max_size=40) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
@QUICK
def test_any_bytes_as_deepspeed_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "ds.json").write_bytes(data)
    try:
        assert isinstance(read_ds_config(tmp_path / "ds.json"), dict)
    except UserError as error:
        assert_line(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' stands twice in one object"),
        ('{"zero_optimization": [1]}', r"zero_optimization is an object of DeepSpeed's, \{...\}, not \[1\]"),
        ('{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage='3'; choose 0, 1, 2 or 3"),
        ('{"zero_optimization": {"offload_param": {"device": ["cpu"]}}}', r"device=\['cpu'\]; write \"cpu\""),
        ('{"a": ' * 25 + "1" + "}" * 25, "more than 20 objects within each other"),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"seed": {"9" * 5000}}}', "not valid JSON: Exceeds the limit"),
    ],
)
def test_deepspeed_files_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=said):
        resolve(read_ds_config(tmp_path / "ds.json"), RunConfig(), 1, CPU)
