"""The kernels build for GPUs that are not here: Triton's compiler and NVIDIA's assembler need none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
import json, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sacl_ds.losses import triton as kernels

architecture, name = int(sys.argv[1]), sys.argv[2]
kernel, kind = getattr(kernels, sys.argv[3]), getattr(kernels, sys.argv[4]).value
dtype = getattr(torch, name)
blocks = kernels.Blocks.of(kernel, dtype)
constants = dict(
    KIND=kind, SAME_BATCH=True, ID_COLUMNS=2, KEPT=False, BOTH=True, BLOCK_ROWS=blocks.rows,
    BLOCK_COLUMNS=blocks.columns, BLOCK_WIDTH=blocks.width, PRECISION="tf32" if name == "float32" else "ieee",
)
features = {"bfloat16": "*bf16", "float32": "*fp32"}[name]
kinds = dict.fromkeys(["v", "t", "teacher_v", "teacher_t", "out"], features)
kinds |= dict.fromkeys(["row_ids", "column_ids"], "*i32") | dict.fromkeys(constants, "constexpr")
kinds |= dict.fromkeys(["n_rows", "n_columns", "width", "teacher_width", "offset", "span"], "i32")
kinds |= dict.fromkeys(["sharpness", "teacher_sharpness", "log_student", "log_teacher"], "fp32")
signature = {argument: kinds.get(argument, "*fp32") for argument in kernel.arg_names}
aligned = [a for a in signature if signature[a].startswith("*") or a in ("width", "teacher_width")]
attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
built = triton.compile(
    ASTSource(kernel, signature, constants, attributes),
    target=GPUTarget("cuda", architecture, 32),
    options={"num_warps": blocks.warps, "num_stages": blocks.stages},
)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(built.asm["cubin"])
    file.flush()
    tool = triton.__path__[0] + "/backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
ptx = built.asm["ptx"]
print(json.dumps({"usage": usage, "wgmma": "wgmma" in ptx, "mma": "mma.sync" in ptx, "shared": built.metadata.shared}))
"""


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize(
    ("kernel", "dtype", "kind"), [("sums_kernel", "bfloat16", "MIXED"), ("gradient_kernel", "bfloat16", "MIXED")]
)
def test_builds_for_ampere_and_hopper(architecture: int, dtype: str, kind: str, kernel: str, tmp_path: Path) -> None:
    """With a teacher: on tensor cores, within an SM's shared memory, next to nothing spilled from registers."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(architecture), dtype, kernel, kind]
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    stack = int(re.search(r"STACK:(\d+)", found["usage"]).group(1))
    registers = int(re.search(r"REG:(\d+)", found["usage"]).group(1))
    print(f"sm_{architecture} {dtype} {kernel}: {registers} registers, {stack} bytes spilled, {found['shared']} shared")
    assert found["wgmma"] if architecture == 90 else found["mma"]
    assert found["shared"] <= 160 * 1024
    assert stack <= 64
