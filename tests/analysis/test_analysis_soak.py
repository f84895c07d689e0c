"""100,000 pairs with stored features on two cores: within five minutes and 2 GB. make soak."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sacl_ds.analysis.subject import Pairs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """d = 256, around 500 topics, with a teacher's features; some captions twice."""
    folder = tmp_path_factory.mktemp("features")
    count, width = 100_000, 256
    g = np.random.default_rng(0)
    topics = g.standard_normal((500, width)).astype(np.float32)
    which = g.integers(0, 500, count)

    def unit(noise: float) -> np.ndarray:
        x = topics[which] + noise * g.standard_normal((count, width), np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    ids = np.stack([np.arange(count), which * 10_000 + g.integers(0, 10_000, count)], 1)
    names = [f"{number:09d}" for number in range(count)]
    shards = [f"/data/{number // 10_000:05d}.tar" for number in range(count)]
    captions = [f"picture {number} of topic {topic}" for number, topic in enumerate(which)]
    Pairs(names, shards, captions, unit(1.0), unit(1.0), unit(0.7), unit(0.7), ids, 20.0).save(folder)
    return folder


@pytest.mark.parametrize("batches", [195])  # each pair once, in mini-batches of 512
def test_scan_of_100_000_pairs(features: Path, batches: int, tmp_path: Path) -> None:
    started = time.monotonic()
    line = ["scan", str(features), "--batches", str(batches), "--out", str(tmp_path)]
    subprocess.run([sys.executable, "tools/weight_analysis.py", *line], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{batches} mini-batches: {seconds:.0f} s, peak {peak / 1e6:.0f} MB")
    assert seconds < 300
    assert peak < 2e9
