"""What the seconds of a test run go to, by what each test started.

    PYTHONPATH=tests/support python -m pytest -p causes --causes after -m 'not soak' -n 2 --dist loadfile
    python tests/support/causes.py before after

The first writes a JSON line for each test into after.WORKER; the second prints a row for each cause, with the tests and
seconds of every run named.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing import popen_forkserver
from pathlib import Path
from typing import Any

import pytest

CAUSES = {
    "launcher": "`deepspeed`, `torchrun`, several nodes",
    "python": "other processes that import everything anew",
    "program": "other programs (mounts, make)",
    "prepared": "processes forked from one that has imported everything",
    "none": "in the test's own process",
}
_started: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--causes", metavar="FILE", help="write what each test started, and its seconds, to FILE.WORKER")


def pytest_configure(config: pytest.Config) -> None:
    popen, fork = subprocess.Popen.__init__, popen_forkserver.Popen._launch

    def start(self: Any, line: Any, *arguments: Any, **options: Any) -> None:
        _started[_kind(line)] += 1
        popen(self, line, *arguments, **options)

    def launch(self: Any, process: Any) -> None:
        _started["prepared"] += 1
        fork(self, process)

    subprocess.Popen.__init__, popen_forkserver.Popen._launch = start, launch  # type: ignore[method-assign]


def _kind(line: Any) -> str:
    words = [str(word) for word in ([line] if isinstance(line, (str, bytes, Path)) else line)]
    names = {Path(word).name for word in words}
    if names & {"deepspeed", "torchrun", "slurm.sh"}:
        return "launcher"
    return "python" if any(name.startswith("python") for name in names) else "program"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _started.clear()
    begun = time.monotonic()
    try:
        return (yield)
    finally:
        if name := item.config.getoption("--causes"):
            worker = getattr(item.config, "workerinput", {}).get("workerid", "main")
            line = {"test": item.nodeid, "seconds": time.monotonic() - begun, "started": dict(_started)}
            with Path(f"{name}.{worker}").open("a") as file:
                file.write(json.dumps(line) + "\n")


def by_cause(name: str) -> dict[str, list[float]]:
    """The seconds of each test of a run, under the first cause of CAUSES that applies to it."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in sorted(Path(name).parent.glob(f"{Path(name).name}.*")):
        for line in map(json.loads, path.read_text().splitlines()):
            found[next((cause for cause in CAUSES if cause in line["started"]), "none")].append(line["seconds"])
    return found


def main(names: list[str]) -> None:
    runs = [by_cause(name) for name in names]
    print("| tests that start | " + " | ".join(f"{name}: tests | seconds" for name in names) + " |")
    print("|---|" + "---:|---:|" * len(names))
    for cause, words in CAUSES.items():
        print(f"| {words} | " + " | ".join(f"{len(run[cause])} | {sum(run[cause]):.0f}" for run in runs) + " |")
    totals = [[second for seconds in run.values() for second in seconds] for run in runs]
    print("| all | " + " | ".join(f"{len(seconds)} | {sum(seconds):.0f}" for seconds in totals) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
