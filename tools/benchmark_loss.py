"""Time and peak memory of the contrastive loss, forward and backward: ours, the dense form, and what others run.

Every implementation gets the same features; rounds alternate between them, and the median counts. Memory is what a
fresh process needs on top of the features. Peers: open_clip's ClipLoss (pip install open_clip_torch) and Inf-CL's two
calls of cal_flash_loss (pip install inf_cl, CUDA only), called as their users call them; left out where missing.

example: python tools/benchmark_loss.py --pairs 2048 8192 --width 512 --scale 14 --out benchmark
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sacl_ds.config.room import user_path
from sacl_ds.losses import similarity_regulated_loss

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    pairs: int
    width: int
    scale: float
    dtype: str
    device: str
    threads: int


class Inputs:
    """Random unit features; a teacher's that resemble them, as a teacher's would."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator(case.device).manual_seed(0)

        def unit(x: Tensor) -> Tensor:
            return torch.nn.functional.normalize(x, dim=1)

        def draw() -> Tensor:
            return torch.randn(case.pairs, case.width, generator=generator, device=case.device)

        dtype = getattr(torch, case.dtype)
        image, text = draw(), draw()
        self.teacher = [unit(x + draw()).to(dtype) for x in (image, text)]
        self.image, self.text = (unit(x).to(dtype).requires_grad_() for x in (image, text))
        self.scale = torch.tensor(case.scale, device=case.device, requires_grad=True)

    def clear(self) -> None:
        for leaf in (self.image, self.text, self.scale):
            leaf.grad = None


def ours(backend: str, teacher: bool, regulated: bool = True) -> Callable[[Inputs], Step]:
    def make(inputs: Inputs) -> Step:
        options = (
            {"alpha": 0.5, "teacher_image": inputs.teacher[0], "teacher_text": inputs.teacher[1]} if teacher else {}
        )
        sharpness = 3.0 if regulated else 0.0

        def step() -> None:
            similarity_regulated_loss(
                inputs.image, inputs.text, inputs.scale, sharpness=sharpness, backend=backend, **options
            ).loss.backward()

        return step

    return make


def open_clip_loss(inputs: Inputs) -> Step:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda: loss(inputs.image, inputs.text, inputs.scale).backward()


def inf_cl_loss(inputs: Inputs) -> Step:
    from inf_cl import cal_flash_loss

    def step() -> None:
        forth = cal_flash_loss(inputs.image, inputs.text, scale=inputs.scale)
        back = cal_flash_loss(inputs.text, inputs.image, scale=inputs.scale)
        ((forth + back) / 2).mean().backward()

    return step


def implementations(device: str) -> dict[str, Callable[[Inputs], Step]]:
    found: dict[str, Callable[[Inputs], Step]] = {}
    if importlib.util.find_spec("open_clip"):
        found["open_clip"] = open_clip_loss
    if device == "cuda" and importlib.util.find_spec("inf_cl"):
        found["inf_cl"] = inf_cl_loss
    backends = ["triton", "streaming"] if device == "cuda" else ["streaming"]
    for backend in backends:
        found[f"{backend}, InfoNCE"] = ours(backend, False, regulated=False)
        found[f"{backend}, no teacher"] = ours(backend, False)
        found[f"{backend}, teacher"] = ours(backend, True)
    found["dense, no teacher"] = ours("reference", False)
    found["dense, teacher"] = ours("reference", True)
    return found


def times(case: Case, names: list[str], rounds: int) -> dict[str, float]:
    """Median seconds of each, in rounds that alternate between them."""
    inputs = Inputs(case)
    steps = {name: implementations(case.device)[name](inputs) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            inputs.clear()
            _synchronise(case.device)
            started = time.perf_counter()
            step()
            _synchronise(case.device)
            if turn:  # the first is for warming up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def memory(case: Case, name: str) -> float:
    """Bytes on top of the features at the peak of one forward and backward, in this process."""
    warm = Inputs(Case(**{**vars(case), "pairs": 64}))
    implementations(case.device)[name](warm)()  # libraries have loaded what they need
    inputs = Inputs(case)
    step = implementations(case.device)[name](inputs)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) * 1024


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_fresh_process(question: str, case: Case, **more: object) -> object:
    """The answer of this script, asked in a process of its own; None where it ends without one (out of memory)."""
    asked = json.dumps({"question": question, "case": vars(case), **more})
    done = subprocess.run([sys.executable, __file__, "--ask", asked], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def answer(asked: str) -> None:
    request = json.loads(asked)
    case = Case(**request["case"])
    torch.set_num_threads(case.threads)
    if request["question"] == "memory":
        print(json.dumps(memory(case, request["name"])))
    else:
        print(json.dumps(times(case, request["names"], request["rounds"])))


def table(results: list[dict[str, object]]) -> str:
    lines = [
        "| pairs | width | scale | | seconds | of open_clip | MB | of open_clip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        base = next((r for r in results if r["implementation"] == "open_clip" and r["case"] == row["case"]), None)
        case = row["case"]

        def share(key: str, row: dict[str, object] = row, base: dict[str, object] | None = base) -> str:
            return f"{row[key] / base[key]:.2f}" if base and base[key] and row[key] else ""

        shown = (
            f"{row['seconds']:.4g}" if row["seconds"] else "",
            f"{row['bytes'] / 1e6:.0f}" if row["bytes"] else "failed",
        )
        lines.append(
            f"| {case['pairs']} | {case['width']} | {case['scale']:g} | {row['implementation']} | {shown[0]} | "
            f"{share('seconds')} | {shown[1]} | {share('bytes')} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, object]], path: Path) -> None:
    """Seconds and bytes over pairs, one panel each per width and scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(r["case"]["width"], r["case"]["scale"]) for r in results})
    figure, axes = plt.subplots(len(panels), 2, figsize=(11, 3.6 * len(panels)), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(r["implementation"] for r in results))
    for (width, scale), pair in zip(panels, axes, strict=True):
        for axis, key, factor, label in zip(pair, ("seconds", "bytes"), (1, 1e-6), ("seconds", "MB"), strict=True):
            for number, name in enumerate(names):
                here = [r for r in results if r["implementation"] == name and r[key]]
                rows = [r for r in here if (r["case"]["width"], r["case"]["scale"]) == (width, scale)]
                peer = name in ("open_clip", "inf_cl") or name.startswith("dense")
                style = {"color": f"C{number}", "marker": "o", "linestyle": "--" if peer else "-"}
                axis.plot([r["case"]["pairs"] for r in rows], [r[key] * factor for r in rows], label=name, **style)
            axis.set(xscale="log", yscale="log", xlabel="pairs", ylabel=label, title=f"width {width}, scale {scale:g}")
            ticks = sorted({r["case"]["pairs"] for r in results})
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024, 4096, 8192], help="N (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, nargs="+", default=[512], help="d, the teacher's too (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, nargs="+", default=[14.0, 100.0], help="logit scale (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the implementations, e.g. 'streaming, teacher'")
    parser.add_argument("--out", type=user_path, help="folder for results.json, table.md and plot.png")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        answer(options.ask)
        return
    names = [n for n in implementations(options.device) if options.only is None or n in options.only]
    if not names:
        parser.error(f"--only: choose from {', '.join(implementations(options.device))}")
    results: list[dict[str, object]] = []
    for width in options.width:
        for scale in options.scale:
            for pairs in options.pairs:
                case = Case(pairs, width, scale, options.dtype, options.device, options.threads)
                used = {name: in_fresh_process("memory", case, name=name) for name in names}
                fitting = [name for name in names if used[name] is not None]
                taken = in_fresh_process("times", case, names=fitting, rounds=options.rounds) or {}
                results += [
                    {"case": vars(case), "implementation": name, "seconds": taken.get(name), "bytes": used[name]}
                    for name in names
                ]
                print(f"{pairs} pairs of width {width} at scale {scale:g}: done", file=sys.stderr, flush=True)
    device = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, {options.threads} threads"
    )
    text = f"{device}, torch {torch.__version__}, {options.dtype}, forward and backward, median of {options.rounds}\n\n"
    text += table(results)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
        (options.out / "table.md").write_text(text + "\n")
        plot(results, options.out / "plot.png")


if __name__ == "__main__":
    main()
