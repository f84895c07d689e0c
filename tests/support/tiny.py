"""A very small model and batches of it, for tests of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from sacl_ds.config import LossConfig, ModelConfig, RunConfig
from sacl_ds.data.batch import Batch, places_of
from sacl_ds.data.text import IGNORED
from sacl_ds.model.sacl import SaclModel
from sacl_ds.training.objective import PretrainObjective

VOCABULARY = 40


def config(selection: dict[str, object] | None = None, **loss: object) -> RunConfig:
    """selection: of patches; the text is then as wide as the image."""
    model = ModelConfig.model_validate(
        {
            "image_encoder_arguments": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16},
            "image_size": 32,
            "text_width": 32 if selection else 24,
            "text_heads": 2,
            "text_layers": 1,
            "fusion_layers": 1,
            "embed_dim": 16,
            "max_tokens": 12,
            "patch_selection": selection or {},
        }
    )
    return RunConfig(model=model, loss=LossConfig.model_validate(loss))


def varied(model: nn.Module, seed: int = 5) -> nn.Module:
    """Every parameter moved, norms and biases too, so that none can be mistaken for another."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return model.eval()


def objective(run: RunConfig, seed: int = 0) -> PretrainObjective:
    torch.manual_seed(seed)
    return PretrainObjective(SaclModel(run.model, VOCABULARY, pretrained=False), run.loss)


def without_padding(batch: Batch) -> Batch:
    """The same batch with the places of its tokens, as the collator makes it, so that padding is not computed."""
    assert batch.mlm_labels is not None
    tokens, predicted = places_of(batch.attention_mask), places_of(batch.mlm_labels != IGNORED)
    return replace(batch, token_places=tokens, mlm_places=predicted)


def batch(pairs: int, seed: int = 1) -> tuple[Batch, tuple[torch.Tensor, torch.Tensor]]:
    """A batch with padding, masked tokens and one duplicated image id, and teacher features for it."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 10, (pairs,), generator=g)
    mask = (torch.arange(10)[None, :] < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (pairs, 10), generator=g) * mask
    chosen = (torch.rand(pairs, 10, generator=g) < 0.3) & mask.bool()
    chosen[:, 1] = True
    pair_ids = torch.arange(pairs)[:, None]
    pair_ids[-1] = pair_ids[0]
    made = Batch(
        keys=[str(i) for i in range(pairs)],
        captions=[f"pair {i}" for i in range(pairs)],
        shards=[""] * pairs,
        images=torch.randint(0, 256, (pairs, 3, 32, 32), generator=g, dtype=torch.uint8),
        input_ids=ids,
        attention_mask=mask,
        pair_ids=pair_ids,
        masked_ids=ids.masked_fill(chosen, 4),
        mlm_labels=ids.masked_fill(~chosen, IGNORED),
    )
    teacher = (torch.randn(pairs, 8, generator=g, dtype=torch.float64) for _ in "it")
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in teacher)
    return made, (image, text)


def rows(whole: Batch, teacher: tuple[torch.Tensor, torch.Tensor], start: int, stop: int):  # type: ignore[no-untyped-def]
    """Rows start to stop of a batch and its teacher features."""
    parts = {name: value[start:stop] for name, value in vars(whole).items() if isinstance(value, (torch.Tensor, list))}
    return Batch(**parts), (teacher[0][start:stop], teacher[1][start:stop])


def failing(taken: list[int], count: int) -> Iterator[Batch]:
    for number in range(count):
        taken.append(number)
        yield batch(2, seed=number)[0]
    raise OSError("disk gone")
