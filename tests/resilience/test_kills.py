"""kill -9 of random processes at random moments: every resume works, and all batches and losses are as without.

Ranks, ZeRO stage, loader processes and retention are others at each start. ITM is left out: the negatives that it draws
depend on the number of ranks, and so would the losses.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faulty import going
from killing import Death, Log, Paces, Plan, kill, plans
from safetensors.torch import load_file
from starting import SMALL, program

from sacl_ds.faults.restarts import Exit, Status, read_status
from sacl_ds.telemetry.records import read
from sacl_ds.training.checkpoint import versions as installed
from sacl_ds.training.checkpoint_folder import FOLDER, complete, latest, read_checkpoint, read_manifest, verify

SOON = 15  # seconds in which no process of the run is left
KILLS = 50
SAVING = ("writing", "named", "removing")  # how its phases begin
TRAINED = [  # contrastive loss and MLM, with what lies beside the weights in a checkpoint
    "train.global_batch_size=12", "train.log_every=1", "train.eval_every=null", "model.dropout=0",
    "loss.matching_weight=0", "loss.alpha_end=0.5", "momentum.enabled=true", "momentum.queue_size=48",
    "data.scenes.eval_count=20",
]  # fmt: skip


@dataclass(frozen=True)
class Told:
    """One kill, and what followed from it."""

    plan: Plan
    death: Death
    after: int | None  # the step of the checkpoint that the next start went on from

    def line(self, number: int) -> str:
        plan, death = self.plan, self.death
        loaders = ", a loader each" if plan.workers else ""
        ended = "" if death.guarded or len(death.ranks) == plan.ranks else " (launcher)"
        was, found = ("none" if step is None else step for step in (death.before, self.after))
        left = "a checkpoint" if death.left.writing else "a removal" if death.left.removing else ""
        return (
            f"| {number} | {plan.ranks}, ZeRO {plan.stage}{loaders} | {plan.victim} | {death.step} | {death.phase} | "
            f"{death.seconds:.1f}{ended} | {was} | {found} | {left} |"
        )


HEAD = "\n".join(
    (
        "| | ranks | killed | after step | while | s until all ended | checkpoint before | after | left half done |",
        "|---|---|---|---|---|---|---|---|---|",
    )
)


def trained_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read(folder / "metrics.jsonl") if "loss" in line]


def status_fits(plan: Plan, death: Death, status: Status | None, after: int | None) -> bool:
    """What a scheduler reads: that it failed and which rank, where one was left to say so."""
    if not death.guarded:
        return True  # it is that of the start before
    if status is None or (status.checkpoint or 0) > (after or 0):
        return False
    if len(death.ranks) == plan.ranks:
        return status.state == "running"
    lost = [f"rank {rank} " for rank in death.ranks] or ["a loader process of rank "]
    # of a save that was under way the ranks that are left know the checkpoint before it
    recent = (status.checkpoint or 0) >= (death.before or 0) - plan.every
    return status.state == "failed" and recent and all(each in status.message for each in lost)


def check_death(plan: Plan, death: Death, said: str) -> None:
    assert death.seconds < SOON, said[-3000:]
    for rank, code in enumerate(death.codes):
        if rank in death.ranks:
            assert code == -9
        else:
            assert code in ({Exit.FAULT} if death.guarded else {Exit.FAULT, -15}), said[-3000:]
    if death.guarded:
        assert "Traceback" not in said, said[-3000:]
        assert ("error: " in said) == (len(death.ranks) < plan.ranks), said[-3000:]


def check_checkpoints(folder: Path) -> int | None:
    """All that bear a checkpoint's name are whole, and the one to go on from loads; its step."""
    named = sorted((folder / FOLDER).glob("step_*"))
    assert complete(folder / FOLDER) == named
    for each in named:
        manifest = read_manifest(each)
        verify(each, sorted(manifest.files), manifest)
    state = latest(folder)
    if state is None:
        assert not named
        return None
    weights, found = read_checkpoint(folder / FOLDER / f"step_{state.step:08d}")
    assert found == state
    assert all(value.isfinite().all() for value in weights.values())
    return state.step


def killed_run(folder: Path, chain: list[Plan], settings: list[str]) -> tuple[list[Told], dict[int, str]]:
    """Each start of `chain` with its kill, and a last one to the end: what happened, and the digest of the batch of
    each step that any of them made."""
    told: list[Told] = []
    paces, digests = Paces(), dict[int, str]()
    at: int | None = None
    kept: list[dict[str, Any]] = []  # lines of steps that no start is to make again
    for plan in chain:
        log = Log(folder, at or 0)
        arguments = [*plan.arguments, *(["--resume"] if at is not None else [])]
        with going(folder, *arguments, ranks=plan.ranks, stage=plan.stage, settings=settings) as run:
            death = kill(run, plan, log, paces)
            said = run.said
        check_death(plan, death, said)
        at = check_checkpoints(folder)
        assert (at or 0) >= (death.before or 0)
        assert status_fits(plan, death, read_status(folder), at), (plan, death, at, read_status(folder))
        lines = trained_lines(folder)
        assert lines[: len(kept)] == kept
        for line in lines:
            assert digests.setdefault(line["step"], line["batch_digest"]) == line["batch_digest"]
        kept = [line for line in lines if line["step"] <= (at or 0)]
        assert [line["step"] for line in kept] == list(range(1, (at or 0) + 1))
        told.append(Told(plan, death, at))
        print(told[-1].line(len(told)), flush=True)
    plan = chain[-1]
    last = ["--ds_config", f"ds_configs/zero{plan.stage}.json", f"output_dir={folder}", *settings, "--resume"]
    program("launch/pretrain.py", *last, ranks=plan.ranks)
    assert trained_lines(folder)[: len(kept)] == kept
    return told, digests


@dataclass(frozen=True)
class Difference:
    """Of the killed run to the one that was left alone: of losses the greatest relative one, of weights the greatest
    absolute one."""

    steps: int
    loss: float
    weight: float


def compared(killed: Path, whole: Path, digests: dict[int, str]) -> Difference:
    """Batches must be the same at every step, also at those that were lost and made again."""
    ours, theirs = trained_lines(killed), trained_lines(whole)
    steps = [line["step"] for line in theirs]
    assert [line["step"] for line in ours] == steps == list(range(1, len(steps) + 1))
    expected = {line["step"]: line["batch_digest"] for line in theirs}
    assert len(set(expected.values())) == len(expected)
    assert {line["step"]: line["batch_digest"] for line in ours} == expected
    assert digests.items() <= expected.items()
    loss = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True))
    found, wanted = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert found.keys() == wanted.keys()
    return Difference(len(steps), loss, max(float((found[name] - wanted[name]).abs().max()) for name in wanted))


def page_of(told: list[Told], difference: Difference, seed: int) -> str:
    """The log as Markdown."""
    seconds = sorted(each.death.seconds for each in told if each.death.guarded)
    lost = [each.death.step - (each.after or 0) for each in told]
    saving = sum(each.death.phase.startswith(SAVING) for each in told)
    half = sum(bool(each.death.left.writing or each.death.left.removing) for each in told)
    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    return "\n".join(
        (
            f"{len(told)} kills (seed {seed}), {saving} of them while a checkpoint was saved; {half} left a checkpoint "
            f"half written or half removed. {versions}; {platform.machine()}, {os.cpu_count()} cores.",
            "",
            "* every start after a kill went on from the checkpoint that `latest` named, or from the beginning where "
            f"there was none yet; lost were 0 to {max(lost)} steps, {sum(lost)} in all, and made again",
            f"* the batches of all {difference.steps} steps, in their order, are those of the run that was left alone, "
            "also where a step was made twice",
            f"* its losses differ by {difference.loss:.1e} at most (relative), its last weights by "
            f"{difference.weight:.1e} (absolute)",
            f"* all processes had ended {seconds[len(seconds) // 2]:.1f} s after the kill in the middle, "
            f"{seconds[-1]:.1f} s at most, where ranks watched each other already",
            "",
            HEAD,
            *(each.line(number) for number, each in enumerate(told, 1)),
            "",
        )
    )


def whole_run(folder: Path, settings: list[str]) -> Path:
    """On one rank, never stopped."""
    program("launch/pretrain.py", "--ds_config", "ds_configs/zero1.json", f"output_dir={folder}", *settings)
    return folder


@pytest.mark.slow
def test_three_kills(tmp_path: Path) -> None:
    settings = [*SMALL, *TRAINED, "teacher.steps=0", "train.steps=12"]
    chain = [
        Plan(2, 2, "a loader", "step", workers=1, every=1, ahead=1),
        Plan(2, 3, "another rank", "writing", workers=1),  # whose loader must notice
        Plan(1, 1, "all", "naming", keep=2),
    ]
    told, digests = killed_run(tmp_path / "killed", chain, settings)
    difference = compared(tmp_path / "killed", whole_run(tmp_path / "whole", settings), digests)
    assert all(each.death.guarded for each in told)
    assert all(each.after for each in told)
    assert difference.steps == 12
    assert difference.loss < 1e-4


@pytest.mark.soak
def test_fifty_kills(tmp_path: Path) -> None:
    """The tiny preset on shards. SACL_KILLS_SEED: of all that is random here; SACL_KILLS_PAGE: a file for the log."""
    seed = int(os.environ.get("SACL_KILLS_SEED", "0"))
    program("tools/make_shards.py", "scenes", "--per-shard", "90", "--count", "250", "--out", tmp_path / "shards")
    data = ["data.source=shards", f"data.shards={tmp_path}/shards/{{00000..00002}}.tar"]
    whole_run(tmp_path / "first", [*TRAINED, *data, "teacher.steps=30", "train.steps=1"])
    settings = [*TRAINED, *data, f"teacher.checkpoint={tmp_path}/first/teacher", "train.steps=160"]
    settings += ["optim.lr_image=1e-4", "optim.lr_text=1e-4"]  # at 1e-3 rounding has grown a millionfold by then
    print(HEAD, flush=True)
    told, digests = killed_run(tmp_path / "killed", plans(KILLS, seed), settings)
    difference = compared(tmp_path / "killed", whole_run(tmp_path / "whole", settings), digests)
    print(difference)
    if page := os.environ.get("SACL_KILLS_PAGE"):
        Path(page).write_text(page_of(told, difference, seed))
    assert sum(each.death.phase.startswith(SAVING) for each in told) >= KILLS // 4
    assert difference.loss < 1e-4
