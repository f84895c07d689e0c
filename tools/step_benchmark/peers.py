"""open_clip's step: its loss, optimizer and loop, over its own towers or over ours.

As its training does it: AdamW as PyTorch builds it by default, with weight decay on matrices,
DistributedDataParallel, autocast in bf16, no clipping, the temperature clamped after the step. One peer has AdamW
fused, as ours is. With several ranks its loss has --local-loss and --gather-with-grad, as for large batches.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from sacl_ds.config import OptimConfig
from sacl_ds.data.batch import Batch
from sacl_ds.distributed import rank, world_size
from sacl_ds.model.cost import BACKWARD
from sacl_ds.model.sacl import SaclModel
from sacl_ds.telemetry.throughput import RowFlops
from step_benchmark.ours import SMALL_RATE
from step_benchmark.setting import BenchmarkSetting

EQUAL, FUSED, OWN = "open_clip, our towers", "open_clip, our towers, AdamW fused", "open_clip, its towers"


def load(name: str) -> None:
    """Import what the step of that name needs, so that a process does not count it as the step's memory."""
    if name in (EQUAL, FUSED, OWN):
        importlib.import_module("open_clip")


def peers() -> tuple[str, ...]:
    """List the peers' steps that can run here."""
    return (EQUAL, FUSED, OWN) if importlib.util.find_spec("open_clip") else ()


class Towers(nn.Module):
    """Our image and text encoder as open_clip's training takes a model."""

    def __init__(self, model: SaclModel, scale: float) -> None:
        super().__init__()
        self.image_encoder, self.image_projection = model.image_encoder, model.image_projection
        self.text_encoder, self.text_projection = model.text_encoder, model.text_projection
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        image = self.image_projection(self.image_encoder(images).tokens[:, 0])
        text = self.text_projection(self.text_encoder(ids, mask)[:, 0])
        return {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}


class OpenClipStep:
    """Calling it takes a step on `batch`. Its own towers get pixels that are normalised already."""

    def __init__(self, name: str, setting: BenchmarkSetting, batch: Batch) -> None:
        from open_clip.loss import ClipLoss

        torch.manual_seed(0)
        batch = batch.to(setting.device)
        self.precision, self.device, self.batch = setting.precision, setting.device, batch
        self.inputs: tuple[Tensor, ...]
        ours = SaclModel(setting.model, setting.model.vocab_size, pretrained=False)
        optim = OptimConfig()
        if name == OWN:
            self.net: nn.Module = own_towers(setting, ours)
            pixels = (batch.images.cpu() - ours.image_encoder.mean) / ours.image_encoder.std
            ids = pad(batch.input_ids, (0, setting.model.max_tokens - batch.input_ids.shape[1]))
            self.inputs = pixels.to(self.device), ids
        else:
            self.net = Towers(ours, 1 / setting.model.init_temperature)
            self.inputs = batch.images, batch.input_ids, batch.attention_mask
        self.net.to(self.device).train()
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        others = [p for p in self.net.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=SMALL_RATE * optim.lr_text,
            betas=optim.betas,
            eps=optim.eps,
            fused=True if name == FUSED else None,
        )
        self.model = self.net
        if world_size() > 1:
            ids_of_device = [self.device] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.net, device_ids=ids_of_device)
        self.loss = ClipLoss(
            local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank(), world_size=world_size()
        )

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with self._autocast():
            losses = self.loss(**self.model(*self.inputs), output_dict=True)
            total = sum(losses.values())
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, math.log(100))  # type: ignore[union-attr, operator]

    @property
    def flops(self) -> RowFlops:
        """Count the FLOPs of a padded pair with torch's counter: forward, times three for forward and backward."""
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), self._autocast():
            self.net(*(x[:2] for x in self.inputs))
        return RowFlops(BACKWARD * counter.get_total_flops() / 2, 0.0, 0.0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def own_towers(setting: BenchmarkSetting, ours: SaclModel) -> Any:
    """Build open_clip's CLIP as wide and deep as our towers, with as many heads, patches, positions and tokens."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model, vit = setting.model, ours.image_encoder.vit
    heads = vit.blocks[0].attn.num_heads
    vision = CLIPVisionCfg(
        layers=len(vit.blocks),
        width=vit.embed_dim,
        head_width=vit.embed_dim // heads,
        patch_size=vit.patch_embed.patch_size[0],
        image_size=model.image_size,
    )
    text = CLIPTextCfg(
        context_length=model.max_tokens,
        vocab_size=model.vocab_size,
        width=model.text_width,
        heads=model.text_heads,
        layers=model.text_layers,
    )
    return CLIP(model.embed_dim, vision, text, quick_gelu="quickgelu" in model.image_encoder, output_dict=True)
