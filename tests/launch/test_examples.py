"""The examples run where they are meant to be used: open_clip's model, transformers' Trainer."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def test_open_clip() -> None:
    """With sharpness 0 it is ClipLoss, gradients too; regulated, a model of open_clip learns by it."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip_loss import RegulatedClipLoss

    torch.manual_seed(0)
    features = [normalize(torch.randn(9, 5), dim=1).requires_grad_() for _ in "it"]
    scale = torch.tensor(14.0, requires_grad=True)
    theirs = torch.autograd.grad(open_clip.loss.ClipLoss()(*features, scale), [*features, scale])
    ours = torch.autograd.grad(RegulatedClipLoss(sharpness=0.0)(*features, scale), [*features, scale])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)

    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        output_dict=True,
    )
    images, texts = torch.randn(12, 3, 32, 32), torch.randint(1, 50, (12, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = RegulatedClipLoss()(**model(images, texts), output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_transformers_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import CLIPConfig, CLIPModel, TrainingArguments
    from transformers_trainer import RegulatedTrainer

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    data = [
        {"input_ids": torch.randint(1, 49, (8,)), "pixel_values": torch.randn(3, 32, 32), "return_loss": True}
        for _ in range(16)
    ]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "pixel_values")}

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, max_steps=30, learning_rate=1e-3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = RegulatedTrainer(model=CLIPModel(config), args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]
