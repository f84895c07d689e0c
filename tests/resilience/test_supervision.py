"""Processes that are started anew, and requests to stop, with real small processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from sacl_ds.faults.restarts import Exit

SUPERVISE = """
import sys
from sacl_ds.faults import restarts
restarts._PAUSE = 0.2
sys.exit(restarts.supervise([sys.executable, "-u", *sys.argv[2:]], int(sys.argv[1])))
"""
# tells how it was started, then ends with the next of the statuses that it was given, by that signal where below 0
CHILD = """
import os, sys, time
from pathlib import Path
from sacl_ds.faults import restarts
restarts.die_with_supervisor()
folder, statuses = Path(sys.argv[1]), sys.argv[2].split(",")
number = restarts.attempt()
store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
(folder / f"start_{number}").write_text(f"{os.environ.get('MASTER_PORT')} {store} {restarts.supervised()}")
status = int(statuses[min(number, len(statuses) - 1)])
if status < 0:
    os.kill(os.getpid(), -status)
    time.sleep(10)
os._exit(status)
"""
# waits, and notes the signals that come
WAITING = """
import os, signal, sys, time
from pathlib import Path
from sacl_ds.faults import restarts
folder = Path(sys.argv[1])
def note(number, frame):
    (folder / signal.Signals(number).name).touch()
    if "ends" in sys.argv:
        os._exit(75)
signal.signal(signal.SIGTERM, note)
restarts.die_with_supervisor()
(folder / "pid.new").write_text(str(os.getpid()))
(folder / "pid.new").rename(folder / "pid")
while True:
    time.sleep(0.05)
"""
# as a run listens: prints the reason, once there is one
LISTENING = """
import os, sys, time
from sacl_ds.faults import guard as signals
signals._EVERY, signals.IMPATIENT = 0.3, 1.0
requests = signals.Requests()
requests.listen(lambda: os._exit(70), float(sys.argv[1]))
print("ready", flush=True)
while requests.reason is None:
    time.sleep(0.02)
print(requests.reason, flush=True)
time.sleep(30)
"""


@dataclass
class Scripts:
    folder: Path

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def start(self, limit: int, script: str, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")}
        line = [sys.executable, "-c", SUPERVISE, str(limit), script, *arguments]
        return subprocess.Popen(line, env=kept | env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def starts(self) -> list[str]:
        count = len(list(self.folder.glob("start_*")))
        return [(self.folder / f"start_{number}").read_text() for number in range(count)]

    def pid(self) -> int:
        until((self.folder / "pid").exists)
        return int((self.folder / "pid").read_text())


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    made = Scripts(tmp_path)
    yield made
    if (tmp_path / "pid").exists() and alive(made.pid()):
        os.kill(made.pid(), signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("statuses", "limit", "started", "status"),
    [
        ("0", 3, 1, 0),
        ("2", 3, 1, Exit.MISTAKE),
        ("75", 3, 1, Exit.STOPPED),
        ("70,70,0", 3, 3, 0),
        ("70,2", 3, 2, Exit.MISTAKE),
        ("70", 2, 3, Exit.FAULT),
        ("70", 0, 1, Exit.FAULT),
        ("1,75", 3, 2, Exit.STOPPED),
        ("-9,0", 1, 2, 0),
        ("-9", 1, 2, 128 + 9),
        ("-15,0", 1, 2, 0),
    ],
)
def test_what_is_started_anew(statuses: str, limit: int, started: int, status: int, scripts: Scripts) -> None:
    """Faults and kills, as often as allowed; neither what went well nor mistakes nor a run that was asked to stop."""
    script = scripts.write("child.py", CHILD)
    settings = {"MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert scripts.start(limit, script, str(scripts.folder), statuses, **settings).wait(60) == status
    # each attempt meets on a port of its own, and none but the first on that of torchrun's store
    expected = [f"{29500 + n} {'False' if n else 'True'} True" for n in range(started)]
    assert scripts.starts() == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number: signal.Signals, scripts: Scripts) -> None:
    script = scripts.write("waiting.py", WAITING.replace("signal.SIGTERM, note", f"{int(number)}, note"))
    supervisor = scripts.start(5, script, str(scripts.folder), "ends")
    scripts.pid()
    supervisor.send_signal(number)
    assert supervisor.wait(20) == Exit.STOPPED
    assert (scripts.folder / number.name).exists()


def test_a_request_ends_restarts(scripts: Scripts) -> None:
    """One whose answer is a fault: asked to stop is asked to stop."""
    script = scripts.write("waiting.py", WAITING.replace("_exit(75)", "_exit(70)"))
    supervisor = scripts.start(5, script, str(scripts.folder), "ends")
    first = scripts.pid()
    supervisor.terminate()
    assert supervisor.wait(20) == Exit.FAULT
    assert scripts.pid() == first


def test_a_request_between_two_starts(scripts: Scripts) -> None:
    script = scripts.write("child.py", CHILD)
    supervise = scripts.write("supervise.py", SUPERVISE.replace("0.2", "1.0"))
    supervisor = subprocess.Popen([sys.executable, supervise, "5", script, str(scripts.folder), "70"])
    until(lambda: scripts.starts() and scripts.starts()[0])
    time.sleep(0.5)
    supervisor.terminate()
    assert supervisor.wait(20) == Exit.STOPPED
    assert len(scripts.starts()) == 1


def test_a_request_while_the_next_process_starts(scripts: Scripts) -> None:
    """Between its start and the moment that the supervisor has it in hand: it is asked all the same."""
    script = scripts.write("waiting.py", WAITING)
    meanwhile = """
import os, signal, subprocess
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
"""
    supervise = scripts.write("supervise.py", meanwhile + SUPERVISE)
    supervisor = subprocess.Popen([sys.executable, supervise, "5", script, str(scripts.folder), "ends"])
    assert supervisor.wait(20) in (Exit.STOPPED, 128 + signal.SIGTERM)  # it may not have come to listen


def test_a_supervisor_that_is_killed(scripts: Scripts) -> None:
    """Its process is asked to stop, by the system."""
    script = scripts.write("waiting.py", WAITING)
    supervisor = scripts.start(5, script, str(scripts.folder), "ends")
    child = scripts.pid()
    supervisor.kill()
    supervisor.wait()
    until(lambda: not alive(child))
    assert (scripts.folder / "SIGTERM").exists()


def test_a_supervisor_that_is_gone_before_its_process_asks(scripts: Scripts) -> None:
    script = scripts.write("waiting.py", WAITING)
    env = os.environ | {"SACL_DS_SUPERVISOR": str(2**22 + 1)}
    child = subprocess.run([sys.executable, script, str(scripts.folder)], env=env, timeout=30)
    assert child.returncode == Exit.FAULT
    assert not (scripts.folder / "pid").exists()


def listening(grace: float) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", LISTENING, str(grace)]
    return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_reason_is_the_first_signal(number: signal.Signals) -> None:
    child = listening(60)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.stdout.readline() == f"{number.name}\n"
    child.send_signal(signal.SIGTERM)  # changes nothing: launchers send it twice, to the process and to its group
    time.sleep(0.3)
    assert child.poll() is None
    child.kill()
    child.communicate()


def test_a_second_interrupt_ends_at_once_but_a_stutter_does_not() -> None:
    child = listening(60)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for _ in range(2):
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert child.poll() is None
    time.sleep(1.1)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=10)
    assert child.returncode == -signal.SIGINT


@pytest.mark.parametrize("grace", [0.5, 60])
def test_a_launcher_that_is_killed(grace: float, tmp_path: Path) -> None:
    """A process of the launcher's name above: the run is asked to stop, and ends where no step comes to do so."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, *sys.argv[1:]])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    (tmp_path / "run.py").write_text(LISTENING)
    above = subprocess.Popen(
        [sys.executable, str(launcher), str(tmp_path / "run.py"), str(grace)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert above.stdout is not None
    said = {above.stdout.readline().strip(), above.stdout.readline().strip()}
    (pid,) = (int(each) for each in said - {"ready"})
    try:
        time.sleep(0.5)
        assert alive(pid)
        above.kill()
        assert above.stdout.readline() == "its launcher has ended\n"
        if grace < 1:
            until(lambda: not alive(pid))
        else:
            time.sleep(0.6)
            assert alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
        above.communicate()


def test_no_launcher_above() -> None:
    """A shell, pytest or a scheduler's own process is none: their end is no request."""
    child = subprocess.run(
        [sys.executable, "-c", "from sacl_ds.faults.guard import launchers; print(launchers())"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert child.stdout == "[]\n"
