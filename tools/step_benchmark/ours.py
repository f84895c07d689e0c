"""Our steps: a configuration's objective through the DeepSpeed engine, as a run takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch, View
from sacl_ds.distributed import rank, world_size
from sacl_ds.ds_config import resolve
from sacl_ds.losses import similarity_regulated_loss
from sacl_ds.machine import Machine
from sacl_ds.model.sacl import SaclModel
from sacl_ds.telemetry.throughput import RowFlops
from sacl_ds.training.engine import build_engine, prepare_model, set_learning_rates
from sacl_ds.training.objective import Features, PretrainObjective, Targets, step_regulation
from sacl_ds.training.pretrain_task import pair_flops
from sacl_ds.training.step import FrozenModels, Losses, contrastive_step
from sacl_ds.training.step import Step as TrainingStep
from step_benchmark.setting import BenchmarkSetting

Step = Callable[[], None]
SMALL_RATE = 1e-3  # of the learning rate: the batch is always the same, and is not to be learnt by heart
_ALPHA = 0.5


@dataclass(frozen=True)
class StepVariant:
    """Variant of our step. fusion: ITM and MLM as well. placement: of patch selection."""

    fusion: bool = False
    contrastive: Literal["infonce", "sacl"] = "sacl"
    teacher: Literal["live", "stored"] | None = None
    placement: Literal["none", "output", "published"] = "none"


CASES = {
    "ITC, InfoNCE": StepVariant(contrastive="infonce"),
    "ITC, SACL": StepVariant(),
    "ITC, SACL, stored teacher": StepVariant(teacher="stored"),
    "ITC, SACL, live teacher": StepVariant(teacher="live"),
    "three losses": StepVariant(fusion=True),
    "three losses, stored teacher": StepVariant(fusion=True, teacher="stored"),
    "three losses, live teacher": StepVariant(fusion=True, teacher="live"),
    "three losses, patches at output": StepVariant(fusion=True, placement="output"),
    "three losses, patches as published": StepVariant(fusion=True, placement="published"),
}


def run_of(case: StepVariant, setting: BenchmarkSetting) -> RunConfig:
    """Return the configuration whose training step this is. Raises UserError where its ranks do not divide the batch
    (`resolve`)."""
    selection = setting.model.patch_selection.model_copy(update={"placement": case.placement})
    weights = {} if case.fusion else {"matching_weight": 0.0, "mlm_weight": 0.0}
    return RunConfig.model_validate({
        "model": setting.model.model_copy(update={"patch_selection": selection}).model_dump(),
        "loss": {"contrastive": case.contrastive, **weights},
        "train": {
            "global_batch_size": setting.batch,
            "micro_batch_size": setting.micro_batch,
            "precision": setting.precision,
            "checkpoint_activations": setting.checkpoint,
        },
        "kernels": {"compile": setting.compiled},
    })  # fmt: skip


class OurStep:
    """Training step of `case` on `batch`, called to take it; the batch is on the host if it has micro-batches."""

    def __init__(self, case: StepVariant, setting: BenchmarkSetting, batch: Batch, machine: Machine) -> None:
        self.run, self.device = run_of(case, setting), setting.device
        torch.manual_seed(0)
        model = SaclModel(self.run.model, self.run.model.vocab_size, pretrained=False)
        config = resolve(setting.ds, self.run, world_size(), machine, name=setting.ds_name)
        prepare_model(model, self.run, config)
        self.engine = build_engine(PretrainObjective(model, self.run.loss), config, self.run.optim)
        self.engine.train()
        teacher = FrozenTeacher(self.run, self.device) if case.teacher else None
        self.frozen = FrozenModels(teacher, precision=self.run.train.precision)
        batch = batch if case.teacher == "stored" else replace(batch, teacher_features=None)
        self.rows, passes = self.run.micro_batches(world_size())
        self.batch = batch.to(self.device) if passes == 1 else batch
        self.taken = 0

    @property
    def flops(self) -> RowFlops | None:
        return pair_flops(self.run, self.run.model.vocab_size)

    def __call__(self) -> None:
        set_learning_rates(self.engine, self.run.optim, SMALL_RATE)
        self._step()
        self.engine.step()
        self.taken += 1

    def _step(self) -> tuple[Losses, Features, Targets]:
        """Run forward and backward."""
        seed = self.taken * world_size() + rank()
        generator = torch.Generator(self.device).manual_seed(seed)
        step = TrainingStep(self.taken, seed, generator, self.device, self.rows, alpha=_ALPHA)
        return contrastive_step(self.engine, self.batch, step, self.frozen)

    def loss_alone(self) -> Step:
        """Run forward and backward of the contrastive loss of this step's own features, over all ranks."""
        losses, features, targets = self._step()
        self.engine.step()
        self.taken += 1
        ids = self.batch.pair_ids.to(self.device)
        return _loss_step(self.run, targets, *features, losses["logit_scale"], ids)


def _loss_step(run: RunConfig, targets: Targets, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Step:
    regulation, teacher = step_regulation(run.loss, targets)
    image, text, scale = (part.detach().clone().requires_grad_() for part in (image, text, scale.float()))
    of_teacher: dict[str, Any] = {"teacher_image": teacher[0], "teacher_text": teacher[1]} if teacher else {}

    def step() -> None:
        for leaf in (image, text, scale):
            leaf.grad = None
        similarity_regulated_loss(
            image,
            text,
            scale,
            alpha=regulation.alpha,
            sharpness=regulation.sharpness,
            teacher_sharpness=regulation.teacher_sharpness,
            pair_ids=ids,
            counts=[len(image)] * world_size(),
            **of_teacher,
        ).loss.backward()

    return step


class FrozenTeacher(nn.Module):
    """A `Teacher` of the same shape as the model, as that of a finished run is, with weights that nobody trained."""

    view: View  # of samples, which there are none of here
    identity = "of the benchmark"

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        super().__init__()
        self.model = SaclModel(run.model, run.model.vocab_size, pretrained=False).to(device)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)[1]

    @torch.no_grad()
    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode_text(input_ids, attention_mask)[1]
