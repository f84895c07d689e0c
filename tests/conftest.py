import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples in every run; how long one takes is the machine's, and nothing that fails
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where kernels are defined
_worker, _workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _worker and hasattr(os, "sched_setaffinity"):
    # each of pytest's processes, and all that it starts, keeps to its own cores: threads of two that share a core wait
    # for each other, actively
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[int(_worker.removeprefix("gw")) :: _workers] or _cores)
sys.path.insert(0, str(Path(__file__).parent / "support"))

ROOT = Path(__file__).parent.parent


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """What an attack would make, and must not come to be."""
    return tmp_path / "proof"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


# longest first, so that of two processes none is left with a long file at the end; other folders come after
_LONGEST = ("launch", "resilience", "tasks", "training", "distributed", "exporting", "doctor", "study", "planning")


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection would walk all of it, and copy its pages in forked processes."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter  # noqa: F401
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what libraries release at the end, they would report as leaked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return _LONGEST.index(folder) if folder in _LONGEST else len(_LONGEST)

    items.sort(key=place)
