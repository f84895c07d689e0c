"""A GPU that runs out of memory says so in one line, and what to lower."""

from pathlib import Path

import pytest
import torch
from starting import start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_out_of_memory(tmp_path: Path) -> None:
    size = ["train.global_batch_size=65536", "model.image_size=480", "data.scenes.count=70000", "teacher.steps=0"]
    done = start(tmp_path / "run", *size, check=False, device="cuda")
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(errors) == 1
    assert "error: out of GPU memory at step 0 with 65536 pairs at once (CUDA out of memory" in errors[0]
    assert "try train.micro_batch_size=32768, which keeps the batch as it is" in errors[0]
