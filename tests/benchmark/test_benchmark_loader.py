"""What the comparison of loaders counts: images, or nothing at all."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documented import assert_documented

from sacl_ds.errors import UserError

OPTIONS = SimpleNamespace(batch_size=32, image_size=64, workers=0, images=64, warm_up=32)


@pytest.fixture(scope="module")
def tool(root: Path) -> dict:
    return runpy.run_path(str(root / "tools/benchmark_loader.py"))


@pytest.fixture(scope="module")
def shards(tool: dict, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tool["write_photographs"](tmp_path_factory.mktemp("shards"), 1, 32)


@pytest.mark.parametrize("name", ["sacl_ds", "open_clip"])
def test_images_are_counted(name: str, tool: dict, shards: str) -> None:
    """Of batches as the loaders give them."""
    if name == "open_clip":
        pytest.importorskip("open_clip_train.data")
    batches = tool["LOADERS"][name](shards, OPTIONS)
    assert tool["count_of"](next(batches), OPTIONS) == 32


@pytest.mark.parametrize(
    "images", ["image", torch.zeros(5, 3, 64, 64), torch.zeros(32, 3, 64, 60), torch.zeros(32, 64), {"image": 0}]
)
def test_what_is_not_the_batch_asked_for_is_refused(images: object, tool: dict) -> None:
    with pytest.raises(UserError, match=r"in the place of images \(32, 3, 64, 64\)") as error:
        tool["count_of"](images, OPTIONS)
    if images == "image" or getattr(images, "shape", None) == (32, 3, 64, 60):
        assert_documented(f"error: {error.value}")


def test_a_batch_of_open_clip_4_is_a_mapping(tool: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pytest.importorskip("open_clip_train.data")
    images = torch.zeros(32, 3, 64, 64)
    loader = SimpleNamespace(dataloader=[{"image": images, "text": torch.zeros(32, 77)}])
    monkeypatch.setattr(data, "get_wds_dataset", lambda *_, **__: loader)
    assert next(tool["LOADERS"]["open_clip"]("", OPTIONS)) is images
