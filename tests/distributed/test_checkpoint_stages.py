"""A checkpoint of any ZeRO stage and number of ranks goes on at any other: same state to the bit, same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from stages import IDENTITY, STEPS, Stage, engine_of, steps, weights_of

from sacl_ds.training import checkpoint
from sacl_ds.training.checkpoint_folder import rank_files, read_checkpoint, read_manifest
from sacl_ds.training.tensor_files import Fragments

MORE = 2  # steps
# by number of ranks
SAVED: dict[int, list[Stage]] = {1: [0], 2: [1, 3], 3: [2]}
RESUMED: dict[int, list[Stage]] = {1: [1, 3], 2: [0, 2, 3], 3: [1, 3]}
OFFLOADED: dict[int, list[Stage]] = {1: ["3_offload"], 2: ["2_offload"]}


def saving(rank: int, world: int, stages: list[Stage], base: Path) -> None:
    for stage in stages:
        folder = base / f"{stage} on {world}"
        engine = engine_of(stage, world, seed=0)
        steps(engine, rank, world, range(STEPS))
        checkpoint.save(engine, folder, STEPS, IDENTITY)
        at_save = weights_of(engine)
        losses = steps(engine, rank, world, range(STEPS, STEPS + MORE))
        if rank == 0:
            torch.save(at_save, folder / "saved.pt")
            (folder / "losses.json").write_text(json.dumps(losses))
        engine.destroy()


def resuming(rank: int, world: int, stages: list[Stage], sources: list[Path], out: Path) -> None:
    for source in sources:
        for stage in stages:
            engine = engine_of(stage, world, seed=7)  # other weights to begin with
            resumed = checkpoint.resume(engine, source, IDENTITY)
            assert (resumed.state.step, resumed.notes) == (STEPS, [])
            again = out / f"{source.name} to {stage} on {world}"
            checkpoint.save(engine, again, STEPS, IDENTITY)  # as it now is
            losses = steps(engine, rank, world, range(STEPS, STEPS + MORE))
            if rank == 0:
                (again / "losses.json").write_text(json.dumps(losses))
            engine.destroy()


def saved(base: Path, wanted: dict[int, list[Stage]]) -> list[Path]:
    for world, stages in wanted.items():
        on_ranks(world, saving, world, stages, base)
    return [base / f"{stage} on {world}" for world, stages in wanted.items() for stage in stages]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved(tmp_path_factory.mktemp("saved"), SAVED)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights and both moments of its checkpoint, whole."""
    folder = run / "checkpoints/step_00000003"
    manifest = read_manifest(folder)
    saved = Fragments(rank_files(folder, manifest))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {f"{kind} {name}": x for kind in kinds for name, x in saved.whole(kind, manifest.shapes).items()}


def check(sources: list[Path], folder: Path, count: int) -> None:
    """What resumed from each source in `folder`: its state then, and the losses that followed."""
    expected = json.loads((sources[0] / "losses.json").read_text())  # of one process
    compared = 0
    for source in sources:
        before = state_of(source)
        for run in folder.glob(f"{source.name} to *"):
            after = state_of(run)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], value) for name, value in before.items()), run.name
            assert json.loads((run / "losses.json").read_text()) == pytest.approx(expected, rel=1e-5), run.name
            compared += 1
    assert compared == count


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3))])
def test_goes_on_at_other_ranks_and_stages(world: int, sources: list[Path], tmp_path: Path) -> None:
    on_ranks(world, resuming, world, RESUMED[world], sources, tmp_path)
    check(sources, tmp_path, len(RESUMED[world]) * len(sources))


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_goes_on_with_offload_and_without(world: int, sources: list[Path], tmp_path: Path) -> None:
    offloaded = saved(tmp_path / "saved", OFFLOADED)
    on_ranks(world, resuming, world, [2, 3], offloaded, tmp_path)
    on_ranks(world, resuming, world, ["2_offload", "3_offload"], sources, tmp_path)
    check([*sources, *offloaded], tmp_path, 2 * len(offloaded) + 2 * len(sources))


def test_what_is_read_without_an_engine(sources: list[Path]) -> None:
    """The weights as they were saved, to the bit; only files that the manifest names, none of them a pickle."""
    for folder in sources:
        place = folder / "checkpoints/step_00000003"
        weights, state = read_checkpoint(place)
        expected = torch.load(folder / "saved.pt", weights_only=True)
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), f"{folder} {name}"
        assert (state.step, state.optimizer_step) == (STEPS, STEPS)
        manifest = json.loads((place / "manifest.json").read_text())
        lying = {path.name for path in place.iterdir()}
        assert lying == {*manifest["files"], "manifest.json"}
        assert {Path(name).suffix for name in lying} == {".json", ".safetensors"}
        assert load_file(place / "rank_00000.safetensors")
