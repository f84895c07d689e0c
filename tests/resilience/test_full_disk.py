"""A disk that fills while a run writes to it: one line says so, and what was whole before stays whole."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty import going
from starting import start

from sacl_ds.faults.restarts import Exit, read_status
from sacl_ds.telemetry.records import read
from sacl_ds.training.checkpoint_folder import latest, read_checkpoint

OFTEN = ["train.save_every=2", "train.eval_every=null", "records.every=0", "data.workers=0", "teacher.steps=0"]


def why_not() -> str | None:
    """What this machine lacks to have a small disk."""
    if os.geteuid() != 0:
        return "a small disk needs root, for a mount namespace"
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "probe", "/mnt"], capture_output=True)
    return f"no mount namespaces here: {tried.stderr.decode().strip()}" if tried.returncode else None


@dataclass
class SmallDisk:
    """A file system of a few megabytes, which only those see who share the mounts of process `keeper`."""

    keeper: int
    place: Path  # as they see it

    @property
    def seen(self) -> Path:
        """The same, as everyone sees it."""
        return Path(f"/proc/{self.keeper}/root{self.place}")

    def inside(self, *command: str) -> None:
        subprocess.run(["nsenter", "--target", str(self.keeper), "--mount", *command], check=True)

    def resize(self, kilobytes: int) -> None:
        self.inside("mount", "-o", f"remount,size={kilobytes}k", str(self.place))

    def fill(self) -> None:
        """To the last page."""
        with (self.seen / "ballast").open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                return


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    reason = why_not()
    if reason and os.environ.get("SACL_REQUIRE_NODES") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    place = tmp_path / "small"
    place.mkdir()
    keeper = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sleep", "infinity"], stdin=subprocess.DEVNULL
    )
    try:
        own = os.readlink("/proc/self/ns/mnt")
        while os.readlink(f"/proc/{keeper.pid}/ns/mnt") == own:
            time.sleep(0.01)
        made = SmallDisk(keeper.pid, place)
        made.inside("mount", "-t", "tmpfs", "-o", "size=1g", "small", str(place))
        yield made
    finally:
        keeper.send_signal(signal.SIGKILL)
        keeper.wait()


def error_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_that_does_not_fit(ranks: int, disk: SmallDisk) -> None:
    """One line on one rank, the checkpoint before it as it was, nothing left of the one that did not fit; with room,
    the run goes on to its end."""
    disk.resize(2200)
    run = disk.seen / "run"
    with going(disk.place / "run", *OFTEN, "train.steps=5", ranks=ranks, mounts=disk.keeper) as at_work:
        at_work.wait(lambda: any(each.exitcode is not None for each in at_work.processes))
        codes = at_work.ended(10)  # the others need no launcher to end them
        said = at_work.said
    assert codes == [Exit.MISTAKE] * ranks
    (line,) = error_lines(said)
    assert line.startswith(f"error: the checkpoint of step 4 cannot be written to {disk.place}/run/checkpoints: ")
    assert "the disk is full; the checkpoint of step 2 is whole: make room, and go on with --resume" in line
    assert "Traceback" not in said
    status = read_status(run)
    assert status is not None
    assert (status.state, status.checkpoint, f"error: {status.message}") == ("failed", 2, line)
    lying = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert lying == ["latest", "step_00000002"]
    assert read_checkpoint(run / "checkpoints/step_00000002")[1].step == 2
    disk.resize(100_000)
    start(disk.place / "run", "--resume", *OFTEN, "train.steps=5", ranks=ranks, mounts=disk.keeper)
    state = latest(run)
    assert state is not None
    assert state.step == 5
    assert [each["step"] for each in read(run / "metrics.jsonl") if "loss" in each] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("ranks", "every", "files"),
    [(2, 0, ("run/metrics.jsonl",)), (1, 1, ("run/weights/", "run/metrics.jsonl"))],  # which is next when it is full
    ids=["log", "records"],
)
def test_a_disk_that_is_full_between_checkpoints(
    ranks: int, every: int, files: tuple[str, ...], disk: SmallDisk
) -> None:
    """What is written at steps does not fit: one line says which file, and the checkpoint before it serves."""
    run, settings = disk.seen / "run", [*OFTEN, f"records.every={every}", "train.steps=100000", "train.save_every=1000"]
    with going(disk.place / "run", *settings, ranks=ranks, mounts=disk.keeper) as at_work:
        at_work.folder = run
        at_work.reach(2)
        disk.fill()
        codes = at_work.ended(120)
        said = at_work.said
    assert codes == [Exit.MISTAKE] * ranks
    (line,) = error_lines(said)
    assert line.startswith(tuple(f"error: {disk.place}/{file}" for file in files))
    assert "cannot be written: the disk is full; " in line
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert "its status cannot be written: " in said
