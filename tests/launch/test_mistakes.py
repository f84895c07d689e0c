"""Each mistake of docs/lab/mistakes.md as a user makes it: that line is the one they see, once, and status is not 0."""

import fcntl
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from documented import assert_documented, said
from PIL import Image
from starting import ROOT, SMALL, launch, losses, program, start
from transformers import CLIPVisionConfig, CLIPVisionModel

from sacl_ds.command_line import launcher_option
from sacl_ds.config import RunConfig
from sacl_ds.config.finetune import FinetuneConfig
from sacl_ds.config_file import load_config
from sacl_ds.config_help import markdown, settings
from sacl_ds.errors import UserError
from sacl_ds.telemetry.records import read
from sacl_ds.training.loop import out_of_memory
from sacl_ds.training.run_folder import check_space


def shard(
    folder: Path,
    broken: dict[int, tuple[bytes | None, bytes | None]],
    twice: Sequence[int] = (),
    apart: Sequence[int] = (),
) -> Path:
    """A shard of 32 pictures; broken: sample -> (its image bytes, its caption), None as usual. twice: samples whose
    picture stands there twice; apart: whose caption has another key."""
    path = folder / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(32):
            buffer = io.BytesIO()
            Image.new("RGB", (48, 48), (8 * i, 0, 0)).save(buffer, "png")
            image, caption = broken.get(i, (None, None))
            for name, data in (
                (f"{i:04d}.png", buffer.getvalue() if image is None else image),
                *([(f"{i:04d}.png", b"again")] if i in twice else []),
                (
                    f"{i:04d}.txt" if i not in apart else f"{i:04d}_.txt",
                    f"number {i}".encode() if caption is None else caption,
                ),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "how",
    [
        {"broken": {20: (b"not a picture", None)}},
        pytest.param({"broken": {20: (None, b"  ")}}, marks=pytest.mark.slow),
        {"broken": {20: (None, b"caf\xe9")}},
        pytest.param({"broken": {}, "twice": [20]}, marks=pytest.mark.slow),
        pytest.param({"broken": {}, "apart": [20]}, marks=pytest.mark.slow),
    ],
    ids=["image", "caption", "encoding", "twice", "apart"],
)
def test_a_broken_sample(how: dict, tmp_path: Path) -> None:
    """One of two ranks meets it: another sample stands in for it, which is said, logged and counted."""
    path = shard(tmp_path, **how)
    arguments = ["data.source=shards", f"data.shards={path}", "teacher.steps=0"]
    done = start(tmp_path / "run", *arguments, ranks=2)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("another sample stands in")]
    assert_documented(line.replace(str(tmp_path), "/data"))
    lines = read(tmp_path / "run/metrics.jsonl")
    named = [fault for line in lines for fault in line.get("faults", ())]
    assert {(fault["kind"], fault["shard"], fault["key"]) for fault in named} == {("bad", str(path), "0020")}
    # 20 steps of 16 are ten epochs of 32
    assert sum(fault["count"] for fault in named) == 10
    assert [line["bad_samples"] for line in lines if "loss" in line][-1] == 10


def test_too_many_broken_samples(tmp_path: Path) -> None:
    """Every rank knows; it is said once."""
    path = shard(tmp_path, {20: (b"not a picture", None)})
    arguments = ["data.source=shards", f"data.shards={path}", "teacher.steps=0", "data.max_bad_share=0"]
    line = said(start(tmp_path / "run", *arguments, ranks=2, check=False), tmp_path)
    assert_documented(re.sub(r"1 of \d+", "1 of 16", line))


def test_nothing_that_can_be_used(tmp_path: Path) -> None:
    """One of two ranks meets it first: that one says it."""
    path = shard(tmp_path, dict.fromkeys(range(32), (None, b" ")))
    arguments = ["data.source=shards", f"data.shards={path}", "teacher.steps=0", "model.vocab_size=300"]
    line = said(start(tmp_path / "run", *arguments, check=False), tmp_path)
    assert_documented(re.sub(r"sample \d{4}", "sample 0007", line))


def test_a_gap_in_the_shards(tmp_path: Path) -> None:
    """Is an error, unless it is allowed: then it is named, kept, and stays when the shard has come back."""
    for number in range(3):
        shard(tmp_path, {}).rename(tmp_path / f"{number}.tar")
    (tmp_path / "1.tar").rename(tmp_path / "away")
    arguments = ["data.source=shards", f"data.shards={tmp_path}/{{0..2}}.tar", "teacher.steps=0", "train.save_every=3"]
    assert_documented(said(start(tmp_path / "run", *arguments, check=False), tmp_path))
    allowed = [*arguments, "data.allow_missing=1"]
    whole = start(tmp_path / "whole", *allowed, "train.steps=6", ranks=2)
    line = f"warning: 1 of 3 shards are missing and left out: {tmp_path}/1.tar"
    assert [each for each in whole.stdout.splitlines() if each.startswith("warning: 1 of")] == [line]
    start(tmp_path / "run", *allowed, "train.steps=3")
    assert (tmp_path / "run/missing_shards.txt").read_text() == f"{tmp_path}/1.tar\n"
    (tmp_path / "away").rename(tmp_path / "1.tar")
    start(tmp_path / "run", "--resume", *allowed, "train.steps=6")
    digests = [
        [each["batch_digest"] for each in read(tmp_path / name / "metrics.jsonl") if "batch_digest" in each]
        for name in ("whole", "run")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 6
    (tmp_path / "2.tar").unlink()
    assert_documented(said(start(tmp_path / "run", "--resume", *allowed, "train.steps=9", check=False), tmp_path))


def test_fewer_shards_than_ranks_and_workers_is_no_mistake(tmp_path: Path) -> None:
    path = shard(tmp_path, {})
    arguments = ["data.source=shards", f"data.shards={path}", "data.workers=1", "teacher.steps=0", "train.steps=4"]
    start(tmp_path / "run", *arguments, ranks=2)
    assert len(losses(tmp_path / "run")) == 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    start(folder / "run", "teacher.steps=0", "train.steps=2")
    return folder


def test_resume_with_another_model(finished: Path) -> None:
    done = start(finished / "run", "--resume", "teacher.steps=0", "model.text_layers=3", check=False)
    assert_documented(said(done, finished))


def test_resume_with_another_vocabulary(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    kept = tmp_path / "run/tokenizer/tokenizer.json"
    tokenizer = json.loads(kept.read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    kept.write_text(json.dumps(tokenizer))
    (tmp_path / "run/checksums.json").unlink()
    done = start(tmp_path / "run", "--resume", "teacher.steps=0", "train.steps=4", check=False)
    assert_documented(said(done, tmp_path))


def test_an_output_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as held:
        held.write("process 4711 on gpu-node-3")
        held.flush()
        fcntl.lockf(held, fcntl.LOCK_EX)
        assert_documented(said(start(tmp_path / "run", check=False), tmp_path))
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_disk_without_room() -> None:
    with pytest.raises(UserError, match=r"GB free, and one checkpoint with the weights takes 16000000000\.0"):
        check_space(ROOT, 10**18, 1)
    free = shutil.disk_usage(ROOT).free
    assert "5000000000 checkpoints take" in str(check_space(ROOT, free // 40, 5_000_000_000))
    assert check_space(ROOT, 1000, 3) is None
    assert "2 checkpoints take" in str(check_space(ROOT, 1000, 2, momentum_bytes=free // 2))


@pytest.mark.slow
def test_a_full_disk_end_to_end(tmp_path: Path) -> None:
    """On a file system of 300 kB, made in a mount namespace of its own."""
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=300k none {tmp_path}/small"
    unshare = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    command = [sys.executable, "launch/pretrain.py", "--ds_config", "ds_configs/zero2.json", *SMALL, "teacher.steps=0"]
    script = f"{mount} && exec {' '.join(map(repr, command))} output_dir={tmp_path}/small/run"
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*unshare, script], cwd=ROOT, env=env, capture_output=True, text=True)
    line = re.sub(r"\d+\.\d (kB|MB)", "N MB", said(done, tmp_path))
    assert_documented(line)


def test_out_of_gpu_memory() -> None:
    """The line; tests/gpu provokes it."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")
    line = out_of_memory(load_config(None, ["train.global_batch_size=4096"]), 1, 512, 8, error)
    assert_documented(f"error: {line}")


@pytest.mark.parametrize("setting", ["model.text_encoder", "teacher.checkpoint", "model.image_encoder"])
def test_a_hub_name_without_network(setting: str, tmp_path: Path) -> None:
    value = {"model.image_encoder": "vit_small_patch16_224"}.get(setting, "some/model")
    more = ["model.image_pretrained=true", "model.image_encoder_arguments={}"] if "image" in setting else []
    done = start(tmp_path / "run", f"{setting}={value}", *more, "teacher.steps=0", check=False)
    assert_documented(re.sub(r" \([^()]*\)$", "", said(done, tmp_path)))


def test_a_clip_with_another_activation(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path / "clip")
    more = ["model.image_encoder=vit_base_patch16_clip_224", f"model.image_weights={tmp_path}/clip"]
    assert_documented(said(start(tmp_path / "run", *more, "teacher.steps=0", check=False), tmp_path))


def test_an_albef_without_its_tokenizer(tmp_path: Path) -> None:
    torch.save({"model": {"temp": torch.ones(1)}}, tmp_path / "ALBEF.pth")
    assert_documented(said(start(tmp_path / "run", f"model.start={tmp_path}/ALBEF.pth", check=False), tmp_path))


@pytest.mark.parametrize("more", [[], ["model.patch_selection.layers=[1]", "model.text_width=64"]])
def test_patches_that_cannot_be_selected(more: list[str], tmp_path: Path) -> None:
    arguments = ["model.patch_selection.placement=tower", *more, "teacher.steps=0"]
    assert_documented(said(start(tmp_path / "run", *arguments, check=False), tmp_path))


def test_a_misspelt_hostfile(tmp_path: Path) -> None:
    options = (f"--hostfile={tmp_path}/hots",)
    assert_documented(said(launch("--ds_config", "ds_configs/zero2.json", *SMALL, options=options), tmp_path))


@pytest.mark.slow
def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ["--ds_config", "ds_configs/zero2.json", f"output_dir={tmp_path}/run", *SMALL]
        done = launch(*arguments, options=("--num_gpus", "1", "--master_port", str(port)))
    assert_documented(said(done, tmp_path).replace(str(port), "29500").replace(str(port + 1), "29501"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("python deepspeed --hostfile a launch/pretrain.py --hostfile b", "a"),
        ("python deepspeed -H a --num_gpus 2 launch/pretrain.py", "a"),
        ("python deepspeed --num_gpus 2 launch/pretrain.py --hostfile b", None),
    ],
)
def test_which_hostfile_the_launcher_was_given(words: str, named: str | None) -> None:
    assert launcher_option(words.split(), ("--hostfile", "-H")) == named


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.stepz=5"],
        pytest.param(["data.source=shards", "data.shards=/nowhere/{0..2}.tar"], marks=pytest.mark.slow),
    ],
)
def test_mistakes_through_the_launcher(arguments: list[str], tmp_path: Path) -> None:
    """Said once and not per rank, also where the launcher ends the ranks that are left."""
    assert_documented(said(start(tmp_path / "run", *arguments, ranks=2, check=False, launcher=True), tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resumme"],
        ["--resume"],
        ["train.global_batch_size=15"],
        ["data.source=shards", "data.shards=' '"],
        ["train.micro_batch_size=5"],
        ["data.grouping=/nowhere/groups.parquet"],
        ["teacher.checkpoint=/nowhere"],
        ["model.image_weights=/nowhere/clip.pt"],
        ["model.start=/nowhere/ALBEF.pth"],
        ["model.start=/data/run", "model.image_weights=/data/clip.pt"],
        ["kernels.apex=on"],
        ["trains=?"],
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], tmp_path: Path) -> None:
    assert_documented(said(start(tmp_path / "run", *arguments, ranks=2, check=False), tmp_path))


def answer(*arguments: str) -> str:
    """What pretrain.py prints on two ranks."""
    return program("launch/pretrain.py", *arguments, ranks=2).stdout


def test_help_and_questions_are_answered_once() -> None:
    text = answer("--help")
    assert text.count("usage:") == 1
    for part in ("--ds_config", "--resume", "--print_config", "key=?", "example:", "train.steps=1000"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    assert answer("loss.contrastive=?").strip() == (
        "loss.contrastive = sacl\n    sacl or infonce; infonce: every negative weighs 1"
    )


def test_the_resolved_configuration_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(answer("--print_config", "train.steps=7"))
    assert load_config(tmp_path / "run.yaml", []) == load_config(None, ["train.steps=7"])


def test_the_documented_configuration_is_the_codes() -> None:
    """docs/configuration.md holds what `make docs` writes."""
    page = (ROOT / "docs/configuration.md").read_text()
    for root in (RunConfig, FinetuneConfig):
        assert markdown(root) in page
        assert all(setting.description for setting in settings(root))


def test_monitors_get_the_figures(tmp_path: Path) -> None:
    ds = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    ds["csv_monitor"]["enabled"] = True
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    start(tmp_path / "run", "--ds_config", f"{tmp_path}/ds.json", "teacher.steps=0", "train.steps=3")
    rows = (tmp_path / "run/csv_monitor/train_itc.csv").read_text().splitlines()
    logged = [line["itc"] for line in read(tmp_path / "run/metrics.jsonl") if "itc" in line]
    assert [float(row.split(",")[1]) for row in rows[1:]] == pytest.approx(logged, rel=1e-6)
    assert (tmp_path / "run/csv_monitor/evaluation_text_to_image_mAP.csv").exists()
