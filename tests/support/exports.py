"""Reads an export as someone does who has transformers and not this package. Run as a program: FOLDER WORK."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TEXTS = ["a red circle", "a blue square to the left of a green triangle and a yellow star", "cross"]
PICTURES = ["0.png", "1.png", "2.png"]


def main(folder: str, work: Path) -> None:
    sys.modules["sacl_ds"] = None  # type: ignore[assignment]  # an import of it fails from here on
    try:
        import sacl_ds  # noqa: F401

        raise SystemExit("sacl_ds can be imported")
    except ImportError:
        pass
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    images = [Image.open(work / name) for name in PICTURES]
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        out = model.eval()(**inputs)
    found = {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}
    assert torch.equal(AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"],
                       inputs["pixel_values"])  # fmt: skip
    assert AutoTokenizer.from_pretrained(folder)(TEXTS, truncation=True)["input_ids"][0] == [
        token
        for token in inputs["input_ids"][0].tolist()
        if token != AutoTokenizer.from_pretrained(folder).pad_token_id
    ]
    save_file({name: tensor.float().contiguous() for name, tensor in found.items()}, work / "found.safetensors")
    classify = pipeline("zero-shot-image-classification", model=folder)
    scores = [
        {each["label"]: each["score"] for each in classify(image, candidate_labels=TEXTS, hypothesis_template="{}")}
        for image in images
    ]
    (work / "scores.json").write_text(json.dumps({"class": type(model).__name__, "scores": scores}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
