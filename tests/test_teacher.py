"""Teachers from elsewhere: a CLIPModel of transformers gives what transformers itself computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starting import losses, start
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from sacl_ds.data.batch import Collator, TrainingView
from sacl_ds.data.sample import Sample
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.model.teacher import load_teacher

WORDS = ["red", "blue", "circle", "cross", "left", "above", "a", "the"]
CAPTIONS = ["a red circle left the blue cross", "cross", "the red circle above a red red red red red circle"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIPModel as save_pretrained leaves it, with processor and tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted({c for word in WORDS for c in word})
    tokens = [*letters, *(c + "</w>" for c in letters), *(word + "</w>" for word in WORDS if len(word) == 2)]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    end = vocabulary["<|endoftext|>"]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(vocabulary), "max_position_embeddings": 24, "eos_token_id": end,
                     "bos_token_id": end - 1, "pad_token_id": end},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    shapes = [(50, 70, 3), (32, 32, 3), (91, 40, 3)]
    images = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    return [Sample(str(i), image, [CAPTIONS[i]], bytes([i])) for i, image in enumerate(images)]


def test_similarities_equal_those_of_transformers(clip: Path) -> None:
    teacher = load_teacher(str(clip), torch.device("cpu"))
    own = TrainingView(CanonicalView(16), Tokenizer(train_wordpiece(CAPTIONS * 3, 60), 12))
    batch = Collator(own, 0, None, teacher.view)(samples(), [0, 0, 0])
    image, text = teacher.features(batch)

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=CAPTIONS, images=[s.image for s in samples()], return_tensors="pt", padding=True, truncation=True,
        max_length=24,
    )  # fmt: skip
    with torch.no_grad():
        theirs = model(**inputs)
    expected = theirs.logits_per_image / model.logit_scale.exp()
    assert torch.allclose(image @ text.T, expected, rtol=0, atol=1e-6)
    assert (image @ text.T).std() > 1e-3
    assert image.shape == text.shape == (3, 16)


def test_a_run_with_a_clip_teacher(clip: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", f"teacher.checkpoint={clip}", "train.steps=3", ranks=2)
    assert losses(tmp_path / "run", "alpha")[0] == 1.0
    assert all(abs(loss) < 50 for loss in losses(tmp_path / "run"))


def test_a_model_of_another_kind_is_refused(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"teacher\.checkpoint=.*cannot be loaded|is a 'bert' model"):
        load_teacher(str(tmp_path), torch.device("cpu"))
    with pytest.raises(UserError, match="without network"):
        load_teacher("nobody/no-such-clip", torch.device("cpu"))
