"""Pairs a second of each placement of patch selection, beside none and beside what its FLOPs promise.

pretraining: ITC, ITM and MLM of a fixed random batch, forward and backward, without the optimizer. finetuning: one text
with one image, which it chooses from at once, a linear head on [CLS], forward and backward. inference: the same,
forward. All placements share one set of weights; rounds go through them forwards and backwards in turn, and what counts
is the median. Memory is the peak on top of the weights (CUDA only).

example: python tools/benchmark_patches.py --size 224 256 384 --batch 64 --dtype bfloat16 --out benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from sacl_ds.analysis.inputs import device_named
from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config import PRESETS, LossConfig, ModelConfig
from sacl_ds.config.room import user_path
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED
from sacl_ds.errors import UserError
from sacl_ds.model.cost import ModelCost
from sacl_ds.model.sacl import SaclModel
from sacl_ds.training.objective import PretrainObjective, Targets

USES = ("pretraining", "finetuning", "inference")
PLACEMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "tower": {"placement": "tower"},
    "tower, guide cls": {"placement": "tower", "guide": "cls"},
    "output": {"placement": "output"},
    "published": {"placement": "published"},
}
ANSWERS = 3129  # as many as VQA v2's usual list has
Step = Callable[[], None]


def model_config(options: argparse.Namespace, size: int, placement: str) -> ModelConfig:
    """Raises UserError."""
    preset = PRESETS[options.preset]
    arguments = dict(preset["image_encoder_arguments"])
    given = {
        "embed_dim": options.width,
        "depth": options.depth,
        "num_heads": options.heads,
        "patch_size": options.patch,
    }
    arguments |= {name: value for name, value in given.items() if value}
    selection = {"keep_rate": options.keep_rate, "layers": options.layers, **PLACEMENTS[placement]}
    text = {"text_width": options.width} if options.width else {}
    text |= {"text_heads": options.heads} if options.heads else {}
    values = {
        "preset": options.preset, "image_size": size, "image_encoder_arguments": arguments, "text_encoder": None,
        "max_tokens": options.text_tokens, "patch_selection": selection, **text,
    }  # fmt: skip
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def with_weights_of(source: SaclModel, config: ModelConfig) -> SaclModel:
    """A model of another selection on the same tensors."""
    with torch.device("meta"):
        made = SaclModel(config, len(source.mlm_head.bias), pretrained=False)
    for name, module in made.named_modules():
        there = source.get_submodule(name)
        module._parameters, module._buffers = there._parameters, there._buffers
    return made


def random_batch(pairs: int, tokens: int, size: int, vocabulary: int, predicted: int, device: torch.device) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (pairs, tokens), generator=g).to(device)
    masked = (torch.arange(tokens, device=device) <= predicted).expand(pairs, -1).clone()
    masked[:, 0] = False
    return Batch(
        keys=[""] * pairs, captions=[""] * pairs, shards=[""] * pairs,
        images=torch.randint(0, 256, (pairs, 3, size, size), generator=g, dtype=torch.uint8).to(device),
        input_ids=ids, attention_mask=torch.ones_like(ids), pair_ids=torch.arange(pairs, device=device)[:, None],
        masked_ids=ids.masked_fill(masked, 4), mlm_labels=ids.masked_fill(~masked, IGNORED),
    )  # fmt: skip


def step_of(use: str, model: SaclModel, batch: Batch, dtype: torch.dtype) -> Step:
    device = batch.images.device
    objective = PretrainObjective(model, LossConfig(backend="streaming"))
    head = nn.Linear(model.matching_head.in_features, ANSWERS, device=device)
    answers = torch.arange(len(batch), device=device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def pretraining() -> None:
        model.train()
        with autocast():
            losses = objective(batch, Targets(None, 0.0, torch.Generator(device).manual_seed(0)))
        losses["loss"].backward()

    def answered() -> torch.Tensor:
        with autocast():
            states, _ = model.encode_text(batch.input_ids, batch.attention_mask)
            tokens = model.image_encoder(batch.images, states[:, 0]).tokens
            return head(model.fuse(states, batch.attention_mask, tokens)[:, 0])

    def finetuning() -> None:
        model.train()
        nn.functional.cross_entropy(answered().float(), answers).backward()

    @torch.no_grad()
    def inference() -> None:
        model.eval()
        answered()

    return {"pretraining": pretraining, "finetuning": finetuning, "inference": inference}[use]


def measure(models: dict[str, SaclModel], use: str, batch: Batch, options: argparse.Namespace) -> dict[str, Any]:
    """For each placement the seconds of every round, and bytes at the peak."""
    dtype, cuda = getattr(torch, options.dtype), batch.images.device.type == "cuda"
    steps = {name: step_of(use, model, batch, dtype) for name, model in models.items()}
    found: dict[str, Any] = {name: {"seconds": [], "bytes": None} for name in steps}
    for turn in range(-options.warmup, options.rounds):
        for name in list(steps) if turn % 2 else reversed(steps):
            models[name].zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            steps[name]()
            if cuda:
                torch.cuda.synchronize()
                found[name]["bytes"] = torch.cuda.max_memory_allocated() - before
            if turn >= 0:
                found[name]["seconds"].append(time.perf_counter() - started)
    return found


def rows_of(
    size: int, use: str, found: dict[str, Any], costs: dict[str, ModelCost], pairs: int
) -> list[dict[str, Any]]:
    def flops(cost: ModelCost) -> float:
        if use == "pretraining":
            return cost.pretraining().training_flops
        return cost.pairing().training_flops if use == "finetuning" else cost.pairing().flops

    rows = []
    for name, measured in found.items():
        ratios = [whole / part for whole, part in zip(found["none"]["seconds"], measured["seconds"], strict=True)]
        rows.append({
            "size": size, "use": use, "placement": name,
            "pairs_per_second": pairs / statistics.median(measured["seconds"]),
            "speed": statistics.median(ratios), "slowest": min(ratios), "fastest": max(ratios),
            "gflops": flops(costs[name]) / 1e9, "promised": flops(costs["none"]) / flops(costs[name]),
            "bytes": measured["bytes"], "seconds": measured["seconds"],
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    memory = any(row["bytes"] is not None for row in rows)
    head = ["use", "px", "placement", "pairs/s", "× none", "its range", "GFLOPs a pair", "FLOPs promise"]
    lines = [[*head, *(["peak GB"] if memory else [])], ["---", "---:", "---", *["---:"] * (len(head) - 3 + memory)]]
    for row in rows:
        spread = f"{row['slowest']:.2f}–{row['fastest']:.2f}" if row["placement"] != "none" else ""
        cells = [row["use"], str(row["size"]), row["placement"], f"{row['pairs_per_second']:.3g}"]
        cells.append(f"{row['speed']:.2f}")
        cells += [spread, f"{row['gflops']:.3g}" if row["gflops"] < 100 else f"{row['gflops']:.0f}"]
        lines.append([*cells, f"{row['promised']:.2f}", *([f"{row['bytes'] / 1e9:.2f}"] if memory else [])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: list[dict[str, Any]], heading: str, path: Path) -> None:
    """Speed beside none's, a panel for each use; a mark where FLOPs alone would put it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    uses, sizes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("use", "size"))
    names = [name for name in dict.fromkeys(row["placement"] for row in rows) if name != "none"]
    figure, axes = plt.subplots(
        1, len(uses), figsize=(1 + 3.6 * len(uses), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    wide = 0.8 / len(sizes)
    for axis, use in zip(axes[0], uses, strict=True):
        for number, size in enumerate(sizes):
            here = {row["placement"]: row for row in rows if (row["use"], row["size"]) == (use, size)}
            shown = [here[name] for name in names if name in here]
            if not shown:  # the run was stopped before it
                continue
            left = (number - (len(sizes) - 1) / 2) * wide
            places = [names.index(row["placement"]) + left for row in shown]
            speeds = [row["speed"] for row in shown]
            low = [row["speed"] - row["slowest"] for row in shown]
            high = [row["fastest"] - row["speed"] for row in shown]
            colour = plt.get_cmap("viridis")(0.15 + 0.6 * number / max(1, len(sizes) - 1))
            axis.bar(places, speeds, 0.9 * wide, color=colour, yerr=(low, high), ecolor="#999999", label=f"{size} px")
            promised, said = [row["promised"] for row in shown], None if number else "by FLOPs"
            axis.scatter(places, promised, marker="_", s=160, color="#d62728", zorder=3, label=said)
        axis.axhline(1, color="#555555", linewidth=0.8)
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
        axis.set_title(use, fontsize=10)
    axes[0, 0].set_ylabel("pairs/s, of none")
    labelled = {label: of for axis in axes[0] for of, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(labelled.values()), list(labelled), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(heading, fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def title(options: argparse.Namespace, device: torch.device) -> str:
    threads = f"{platform.machine()}, {options.threads} CPU threads"
    on = torch.cuda.get_device_name() if device.type == "cuda" else threads
    return f"{on}, torch {torch.__version__}, {options.dtype}, batch {options.batch}, median of {options.rounds}"


def report(rows: list[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> str:
    return f"{title(options, device)}\n\n{table(rows)}"


def write(rows: list[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"settings": vars(options), "rows": rows}
    (options.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    (options.out / "table.md").write_text(report(rows, options, device) + "\n")
    plot(rows, title(options, device), options.out / "plot.png")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS), help="default: %(default)s")
    for name in ("width", "depth", "heads", "patch"):
        parser.add_argument(f"--{name}", type=int, help="of the image encoder, in place of the preset's")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 256, 384], help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pairs, at least 2 (default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=30, help="of every caption (default: %(default)s)")
    parser.add_argument("--keep-rate", type=float, default=0.7, help="default: %(default)s")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10], help="default: %(default)s")
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS), choices=list(PLACEMENTS))
    parser.add_argument("--uses", nargs="+", default=list(USES), choices=USES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: %(default)s)")
    parser.add_argument("--out", type=user_path, help="folder for results.json, table.md and plot.png")
    options = parser.parse_args()
    if options.batch < 2 or options.rounds < 1:
        raise UserError(
            f"--batch {options.batch} --rounds {options.rounds}: at least 2 pairs (ITM needs another) and 1 round"
        )
    return options


def main() -> None:
    options = arguments()
    device, names = device_named(options.device), list(dict.fromkeys(["none", *options.placements]))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for size in options.size:
        configs = {name: model_config(options, size, name) for name in names}
        vocabulary = configs["none"].vocab_size
        predicted = round(LossConfig().mlm_probability * (options.text_tokens - 2))
        source = SaclModel(configs["none"], vocabulary, pretrained=False).to(device)
        models = {name: with_weights_of(source, config) for name, config in configs.items()}
        costs = {name: ModelCost(config, predicted=predicted) for name, config in configs.items()}
        batch = random_batch(options.batch, options.text_tokens, size, vocabulary, predicted, device)
        for use in options.uses:
            rows += rows_of(size, use, measure(models, use, batch, options), costs, options.batch)
            rows.sort(key=lambda row: USES.index(row["use"]))
            if options.out:  # after each, for runs that are stopped
                write(rows, options, device)
            print(f"{use} at {size} px: done", file=sys.stderr, flush=True)
    print(report(rows, options, device))


if __name__ == "__main__":
    try:
        sys.exit(exit_status(main))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
