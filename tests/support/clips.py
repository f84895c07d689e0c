"""A small CLIPModel of transformers on disk, as save_pretrained leaves it, with processor and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

WORDS = ["red", "blue", "circle", "cross", "left", "above", "a", "the"]


def clip_folder(folder: Path) -> Path:
    """Pictures of 32 pixels, vocabulary of the letters of WORDS, weights drawn from a seed."""
    letters = sorted({c for word in WORDS for c in word})
    tokens = [*letters, *(c + "</w>" for c in letters), *(word + "</w>" for word in WORDS if len(word) == 2)]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    end = vocabulary["<|endoftext|>"]
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
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
