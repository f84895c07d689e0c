"""What the doctor reads and judges, by properties; on one node and on two, for real."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.launcher.runner import _parse_hostfile
from documented import assert_documented
from hypothesis import given
from hypothesis import strategies as st
from nodes import KEEP_ALIVE, cluster
from rich.console import Console
from starting import ROOT, program

from sacl_ds.doctor.__main__ import show
from sacl_ds.doctor.comparison import AllReduce, Contact, Examination, groups, judge
from sacl_ds.doctor.facts import PACKAGES, Facts, parse_env_file, parse_hostfile
from sacl_ds.errors import UserError

VERSIONS = dict.fromkeys(("python", "sacl_ds", *PACKAGES), "1.0")
SOUND = Facts(
    "n", VERSIONS, "abc", "cuda", ["H100"] * 8, "570", "12.8", "2.27", cores=96, memory=2000, memory_free=1900,
    shm_free=900, disk_free=5000, shards=4, samples={"a.tar": 10, "d.tar": 9}, sees_token=True, writes=True,
    reaches_master=True,
)  # fmt: skip


def sound(nodes: int) -> Examination:
    names = [f"node{i}" for i in range(nodes)]
    return Examination(
        dict.fromkeys(names, 8),
        dict.fromkeys(names, SOUND),
        dict.fromkeys(names, Contact(None, 0.1, 0.05)),
        master="10.0.0.1",
        output_dir="/shared/run",
        keep_alive=40,
        all_reduce=AllReduce(None, 8 * nodes, 256, 40, "nccl"),
    )


@given(st.integers(1, 12))
def test_sound_nodes_need_nothing(nodes: int) -> None:
    assert judge(sound(nodes)) == []


ODD: list[tuple[dict[str, object], bool, str]] = [
    ({"versions": {**VERSIONS, "torch": "2.0"}}, True, "torch differs: 1.0 on "),
    ({"versions": {**VERSIONS, "timm": None}}, True, "timm is not installed on "),
    ({"git": "def"}, True, "the code's commit differs: abc on "),
    ({"nccl": "2.20"}, True, "NCCL differs"),
    ({"driver": "535"}, False, "the driver differs"),
    ({"gpus": ["A100"] * 8}, False, "the GPU differs: H100 on "),
    ({"gpus": ["H100"] * 7}, True, "has 7 GPUs for slots=8"),
    ({"apex": "other"}, True, "apex differs"),
    ({"missing_tool": "no ninja"}, True, "what compiling lacks differs: none on "),
    ({"disk_free": 3.0}, False, "3.0 GB free at output_dir"),
    ({"shm_free": 0.06}, False, "0.1 GB free in /dev/shm"),
    ({"memory_free": 9.0}, False, "9.0 GB of memory free for 8 ranks"),
    ({"shards": 3}, True, "the number of shards differs: 4 on "),
    ({"samples": {"a.tar": 10, "d.tar": 8}}, True, "the samples of d.tar differs: 9 on "),
    ({"shards_error": "shard b.tar does not exist"}, True, "shard b.tar does not exist"),
    ({"writes": False}, True, "cannot write to output_dir=/shared/run"),
    ({"sees_token": False}, True, "does not see what node0 writes into output_dir=/shared/run"),
    ({"reaches_master": False}, True, "cannot reach 10.0.0.1 port 29500"),
]


@given(st.integers(3, 12), st.data(), st.sampled_from(ODD))
def test_one_node_that_is_not_as_the_others_is_named(nodes: int, data: st.DataObject, odd: tuple) -> None:
    """Whichever it is, and it alone where it is wrong by itself; against the majority where they differ."""
    changes, wrong, said = odd
    seen = sound(nodes)
    name = f"node{data.draw(st.integers(0, nodes - 1))}"
    seen.facts[name] = replace(SOUND, **changes)
    (first, *_) = judge(seen)
    assert first.wrong == wrong
    assert said in first.what
    assert first.do
    if "differs" in first.what:
        majority, minority = first.what.split("; ")
        assert minority.endswith(f" on {name}")
        assert f"{name}," not in majority + ","
    else:
        others = [
            other for other in seen.slots if other != name and f"{other} " in f"{first.what} ".replace("node0 w", "")
        ]
        assert name in first.what
        assert others == []


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 3), min_size=1))
def test_groups_hold_each_node_once_and_the_most_common_first(values: dict[str, int]) -> None:
    found = groups(values)
    assert sorted(node for _, nodes in found for node in nodes) == sorted(values)
    assert all(values[node] == value for value, nodes in found for node in nodes)
    sizes = [len(nodes) for _, nodes in found]
    assert sizes == sorted(sizes, reverse=True)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(0, 3))
def test_clocks(one: float, two: float, uncertain: float) -> None:
    seen = sound(2)
    told = {"node0": Contact(None, one, uncertain), "node1": Contact(None, two, uncertain)}
    said = [finding.what for finding in judge(replace(seen, contacts=told))]
    apart = abs(one - two) - 2 * uncertain
    if apart > 5.001:
        ahead, behind = ("node0", "node1") if one > two else ("node1", "node0")
        assert said == [f"the clock of {ahead} is {abs(one - two):.0f} s ahead of that of {behind}"]
    elif apart < 4.999:
        assert said == []


@pytest.mark.parametrize(
    ("changes", "wrong", "said"),
    [
        ({"keep_alive": 0}, False, "`deepspeed --hostfile` never ends"),
        ({"keep_alive": 1200}, False, "`deepspeed --hostfile` ends 1200 s later"),
        ({"all_reduce": AllReduce("timed out")}, True, "the all-reduce over all ranks failed: timed out"),
        ({"all_reduce": AllReduce(None, 24, 256, 0.9, "nccl")}, False, "the all-reduce over nodes reaches 0.9 GB/s"),
        ({"env_error": ".deepspeed_env, line 2: ..."}, True, ".deepspeed_env, line 2"),
        ({"token_error": "Read-only file system"}, True, "no file can be written to output_dir=/shared/run"),
        ({"gather_errors": {"node2": "No module named sacl_ds"}}, True, "node2 answers, but"),
        ({"contacts": {"node2": Contact("Permission denied (publickey)")}}, True, "node2 does not answer over ssh"),
    ],
)
def test_what_lies_between_nodes(changes: dict[str, object], wrong: bool, said: str) -> None:
    (finding,) = judge(replace(sound(3), **changes))
    assert (finding.wrong, said in finding.what) == (wrong, True)


def test_gloo_where_the_own_name_is_a_loopback_address() -> None:
    facts = dict.fromkeys(("a", "b"), replace(SOUND, device="cpu", gpus=[], own_name_is_loopback=True))
    seen = replace(sound(2), slots={"a": 8, "b": 8}, facts=facts, contacts={})
    (finding,) = judge(seen)
    assert "where gloo would listen" in finding.what
    assert judge(replace(seen, interface_named=True)) == []


entries = st.builds(
    "{} slots={}{}".format,
    st.text("ab.1-", min_size=1, max_size=4),
    st.integers(0, 64),
    st.sampled_from(["", " x", "  "]),
)
hostfile_lines = st.lists(st.one_of(st.just(""), st.text("abc# =slot1 \t", max_size=12), entries), max_size=5)


@given(hostfile_lines)
def test_the_hostfile_is_read_as_deepspeed_reads_it(lines: list[str]) -> None:
    text = "\n".join(lines)
    try:
        expected = dict(_parse_hostfile([f"{line}\n" for line in lines]))
    except ValueError:
        expected = None
    try:
        found = parse_hostfile(text, "hosts")
    except UserError as error:
        found = None
        assert "\n" not in str(error)
    if expected is not None and 0 in expected.values():
        expected = None  # taken by DeepSpeed, and no rank is started there
    assert found == expected


@given(
    st.lists(
        st.one_of(st.text("AB=_1 ", max_size=6), st.builds("{}={}".format, st.text("AB_", min_size=1), st.text("/:=x")))
    )
)
def test_the_environment_file_is_refused_where_it_would_crash_the_launcher(lines: list[str]) -> None:
    """Its own words: `key, val = var.split('=', maxsplit=1)`."""
    text = "".join(f"{line}\n" for line in lines)
    crashes = any("=" not in line for line in lines)
    try:
        found = parse_env_file(text, ".deepspeed_env")
    except UserError as error:
        assert crashes or not all(line.partition("=")[0].strip().isidentifier() for line in lines)
        assert "\n" not in str(error)
    else:
        assert not crashes
        assert found == {line.split("=", 1)[0].strip(): line.split("=", 1)[1].strip() for line in lines}


def test_the_examples_are_read() -> None:
    hosts = (ROOT / "launch/hostfile.example").read_text()
    assert parse_hostfile(hosts, "example") == {"node1": 8, "node2": 8} == dict(_parse_hostfile(hosts.splitlines()))
    values = parse_env_file((ROOT / "launch/deepspeed_env.example").read_text(), "example")
    assert {"PATH", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= values.keys()


def test_many_nodes_that_are_alike_are_one_column() -> None:
    seen = sound(16)
    seen.facts["node7"] = replace(SOUND, driver="535", disk_free=3.0)
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    show(seen, judge(seen), console)
    text = console.export_text()
    assert "node0 and 14 more" in text
    assert "note: the driver differs: 570 on node0, node1, node2, node3 and 11 more; 535 on node7" in text
    assert text.rstrip().endswith("16 nodes, 128 ranks: ready")


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return program("sacl_ds.doctor", *arguments, env={"OMP_NUM_THREADS": "1"}, check=False)


def make_shards(folder: Path) -> str:
    size = ["--per-shard", "5", "--count", "20", "--seed", "1"]
    program("tools/make_shards.py", "scenes", *size, "--out", folder)
    return f"{folder}/{{00000..00003}}.tar"


def test_shards_with_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As data.allow_missing has them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    make_shards(tmp_path / "train")
    (tmp_path / "train/00001.tar").unlink()
    asked = ["--shards", "~/train/{00000..00003}.tar", "--output_dir", "~/run", "--no_all_reduce"]
    done = doctor(*asked, "--allow_missing", "1", "--json")
    ((_, node),) = json.loads(done.stdout)["nodes"].items()
    assert node["facts"]["shards"] == 3
    assert node["facts"]["samples"] == {f"{tmp_path}/train/0000{i}.tar": 5 for i in (0, 2, 3)}
    assert (done.returncode, node["facts"]["writes"]) == (0, True)
    assert f"shard {tmp_path}/train/00001.tar does not exist; correct the pattern" in doctor(*asked).stdout


@pytest.mark.slow
def test_one_node(tmp_path: Path) -> None:
    done = doctor("--shards", make_shards(tmp_path / "train"), "--output_dir", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    ((_, node),) = told["nodes"].items()
    assert node["facts"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert node["facts"]["samples"] == {f"{tmp_path}/train/0000{i}.tar": 5 for i in range(4)}
    assert told["all_reduce"]["ranks"] == 2
    assert told["all_reduce"]["bandwidth"] > 0
    assert told["ready"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is named twice"),
        ("node1\n", "line 1"),
    ],
)
def test_a_hostfile_that_is_not_right(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    done = doctor("--hostfile", str(tmp_path / "hosts"))
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --hostfile {tmp_path}/hosts")
    assert said in line
    assert done.returncode == 2
    if text is not None:
        assert_documented(line.replace(str(tmp_path), "/data"))


@pytest.mark.slow
def test_two_nodes_that_do_not_share_what_they_should(tmp_path: Path) -> None:
    """The second has a disk of its own at output_dir, and other shards; the rest is sound, so that the ranks meet."""
    shards = make_shards(tmp_path / "train")
    (tmp_path / "run").mkdir()
    with cluster(tmp_path) as nodes:
        own = f"cp -r {tmp_path}/train {tmp_path}/other; rm {tmp_path}/other/00003.tar"
        mounts = f"mount --bind {tmp_path}/other {tmp_path}/train; mount -t tmpfs own {tmp_path}/run"
        assert nodes[1].run("bash", "-ec", f"{own}; {mounts}").returncode == 0
        line = [sys.executable, "-m", "sacl_ds.doctor", "--hostfile", nodes.hostfile, "--shards", shards]
        done = nodes[0].run(*line, "--output_dir", tmp_path / "run", "--json", env={"PDSH_SSH_ARGS_APPEND": ""})
        assert done.returncode == 1, done.stdout + done.stderr
        told = json.loads(done.stdout)
        wrong = [finding["what"] for finding in told["findings"] if finding["wrong"]]
        assert wrong == [
            f"node2: --shards: shard {tmp_path}/train/00003.tar does not exist; correct the pattern '{shards}'",
            f"node2 does not see what node1 writes into output_dir={tmp_path}/run",
        ]
        assert any("`deepspeed --hostfile` never ends" in finding["what"] for finding in told["findings"])
        assert told["all_reduce"]["error"] is None
        assert told["all_reduce"]["ranks"] == 2
        assert not list((tmp_path / "run").iterdir())
        # with its cable pulled the second is named, and the keep-alive is found
        nodes[1].cut()
        done = nodes[0].run(*line, "--no_all_reduce", env={"PDSH_SSH_ARGS_APPEND": KEEP_ALIVE})
        assert done.returncode == 1
        assert "wrong: node2 does not answer over ssh: " in done.stdout
        assert "keep-alive" not in done.stdout
