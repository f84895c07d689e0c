"""Blocks computed again in backward, and blocks compiled: the same gradients, for less memory, or in fewer kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from four_layers import Held
from ranks import on_ranks
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from sacl_ds.config import ModelConfig, RunConfig
from sacl_ds.ds_config import resolve
from sacl_ds.errors import UserError
from sacl_ds.machine import Machine, this_machine
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.nlvr2.model import Nlvr2Model
from sacl_ds.tasks.vqa.model import VqaModel
from sacl_ds.training.engine import prepare_model
from sacl_ds.training.objective import PretrainObjective, Targets

SELECTIONS = {
    "none": None,
    "tower": {"placement": "tower", "layers": [2], "keep_rate": 0.5},
    "output": {"placement": "output", "keep_rate": 0.5},
}


def described(selection: str = "none", dropout: float = 0.1) -> RunConfig:
    """Four layers of everything."""
    run = tiny.config(SELECTIONS[selection])
    values = run.model.model_dump() | {"text_layers": 4, "fusion_layers": 4, "dropout": dropout}
    values["image_encoder_arguments"] |= {"depth": 4, "patch_size": 4, "proj_drop_rate": dropout}
    return run.model_copy(update={"model": ModelConfig.model_validate(values)})


def pretraining(selection: str, dropout: float) -> tuple[nn.Module, Callable[[], Tensor]]:
    run = described(selection, dropout)
    torch.manual_seed(0)
    made = PretrainObjective(SaclModel(run.model, tiny.VOCABULARY, pretrained=False), run.loss).train()
    batch = tiny.batch(6)[0]
    return made.model, lambda: made(batch, Targets(None, 0.0, torch.Generator().manual_seed(1)))["loss"]


def vqa() -> tuple[nn.Module, Callable[[], Tensor]]:
    run = described()
    torch.manual_seed(0)
    model = VqaModel(SaclModel(run.model, tiny.VOCABULARY, pretrained=False), run.model, tiny.VOCABULARY).train()
    batch = tiny.batch(6)[0]

    def loss() -> Tensor:
        states = model.encode_question(batch.images, batch.input_ids, batch.attention_mask)
        ids, mask = batch.input_ids[:, :4], torch.ones(6, 4, dtype=torch.long)
        return model.answer_losses(states, batch.attention_mask, ids, mask, torch.arange(6)).sum()

    return model, loss


def nlvr2() -> tuple[nn.Module, Callable[[], Tensor]]:
    run = described()
    torch.manual_seed(0)
    model = Nlvr2Model(SaclModel(run.model, tiny.VOCABULARY, pretrained=False), run.model).train()
    batch = tiny.batch(6)[0]
    return model, lambda: model(batch.images, batch.images.flip(0), batch.input_ids, batch.attention_mask).sum()


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[dict[str, Tensor], int]:
    """Of one step with dropout drawn from a fixed seed, and the bytes held between forward and backward."""
    model.zero_grad()
    torch.manual_seed(7)
    held = Held(model)
    with saved_tensors_hooks(held.pack, lambda tensor: tensor):
        value = loss()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, held.bytes


@pytest.mark.parametrize("kind", ["none", "tower", "output", "vqa", "nlvr2"])
def test_the_same_gradients_with_dropout_for_less_memory(kind: str) -> None:
    model, loss = vqa() if kind == "vqa" else nlvr2() if kind == "nlvr2" else pretraining(kind, 0.1)
    expected, all_of_it = gradients(model, loss)
    assert not all(torch.equal(loss(), loss()) for _ in range(3)), "no dropout"
    model.checkpoint_activations()
    got, little = gradients(model, loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert little < 0.4 * all_of_it
    model.checkpoint_activations(False)
    assert gradients(model, loss)[1] == all_of_it


def step_on_ranks(rank: int, world: int, folder: Path) -> None:
    from deepspeed.utils import safe_get_full_grad

    from sacl_ds.training.engine import build_engine, start_process

    start_process()
    torch.set_num_threads(1)
    whole, teacher = tiny.batch(4)
    part, _ = tiny.rows(whole, teacher, 2 * rank, 2 * rank + 2)
    for on in (False, True):
        run = tiny.config(contrastive="infonce")
        train = run.train.model_copy(update={"global_batch_size": 4, "checkpoint_activations": on})
        run = run.model_copy(update={"train": train})
        config = resolve({"zero_optimization": {"stage": 3}}, run, world, this_machine("cpu"))
        made = tiny.objective(run)
        prepare_model(made.model, run, config)
        assert made.model.image_encoder.vit.grad_checkpointing == on
        engine = build_engine(made, config, run.optim)
        engine.backward(engine(part, Targets(None, 0.0, None))["loss"])
        got = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
        if rank == 0:
            torch.save({name: g for name, g in got.items() if g is not None}, folder / f"{on}.pt")
        engine.step()
        engine.destroy()


def test_under_zero_3_on_two_ranks(tmp_path: Path) -> None:
    on_ranks(2, step_on_ranks, 2, tmp_path)
    plain, again = (torch.load(tmp_path / f"{on}.pt", weights_only=True) for on in (False, True))
    assert plain.keys() == again.keys()
    assert sum(gradient.abs().sum() for gradient in plain.values()) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks(recompute: bool) -> None:
    """Traced by Dynamo and run without Inductor, whose kernels take minutes to build."""
    model, loss = pretraining("none", 0.0)
    expected, _ = gradients(model, loss)
    names = list(model.state_dict())
    model.checkpoint_activations(recompute)
    model.compile_layers(backend="eager")
    got, _ = gradients(model, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert list(model.state_dict()) == names


def test_texts_of_other_lengths_need_no_other_graph() -> None:
    run = described(dropout=0.0)
    model = SaclModel(run.model, tiny.VOCABULARY, pretrained=False)
    model.compile_layers(backend="eager")
    torch._dynamo.reset()
    counters.clear()
    seen = []
    for seed, length in enumerate((10, 7, 9, 12, 6, 8)):
        g = torch.Generator().manual_seed(seed)
        mask = (torch.arange(length) < torch.randint(2, length + 1, (6, 1), generator=g)).long()
        ids, places = torch.randint(5, 40, (6, length), generator=g), mask.flatten().nonzero().squeeze(1)
        states = model.text_encoder(ids, mask, places)
        tokens = torch.randn(2, 5, 32, generator=g)
        images = torch.randint(0, 2, (2,), generator=g)
        model.fuse(states, mask, tokens, repeats=2, images=images, places=places).sum().backward()
        seen.append(counters["stats"]["unique_graphs"])
    assert 0 < seen[0] <= 4
    assert seen[-1] == seen[1], f"graphs after each length: {seen}"
    assert not counters["graph_break"]


def compiling(stage: int) -> None:
    run = tiny.config()
    run = run.model_copy(update={"kernels": run.kernels.model_copy(update={"compile": True})})
    resolve(
        {"zero_optimization": {"stage": stage}},
        run,
        1,
        Machine("cpu", "this cpu", True, False, "none", None),
        name="my.json",
    )


def test_where_blocks_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(2)
    with pytest.raises(UserError, match=r"^my\.json: zero_optimization\.stage=3 .* take a stage below 3.*$"):
        compiling(3)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"^kernels\.compile=true: no C\+\+ compiler \(no-such-compiler\) .*install one.*$"
    ):
        compiling(2)


@pytest.mark.soak
def test_compiled_blocks_drop_the_same_with_and_without_graph() -> None:
    """What micro-batches rest on: their first pass is without. Inductor, which takes a minute to begin."""
    run = tiny.config(contrastive="infonce")
    run = run.model_copy(update={"model": run.model.model_copy(update={"dropout": 0.3})})
    objective = tiny.objective(run).train()
    objective.model.compile_layers()
    batch = tiny.without_padding(tiny.batch(4)[0])

    def features(seed: int, graph: bool) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(graph):
            return objective(batch, None)[1].detach()

    for seed in (1, 2):
        first = features(seed, graph=False)
        torch.testing.assert_close(features(seed, graph=True), first, rtol=0, atol=1e-6)
        assert (features(seed + 10, graph=True) - first).abs().max() > 0.1
