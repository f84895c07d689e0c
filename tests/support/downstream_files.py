"""The tasks' official files, small, with pictures of scenes: what a user has on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from sacl_ds.data.scenes import Scenes

SPLITS = {"train": (24, 5), "val": (8, 6), "test": (7, 7)}  # images, seed


def picture(scenes: Scenes, index: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.image(index)).save(path)


def retrieval(folder: Path) -> list[str]:
    """dataset.json and images/; the settings that name them."""
    entries: list[dict[str, Any]] = []
    for split, (count, seed) in SPLITS.items():
        scenes = Scenes(count, seed)
        for index in range(count):
            name = f"{split}{index}.png"
            picture(scenes, index, folder / "images" / name)
            said = [{"raw": caption} for caption in scenes[index].captions]
            entries.append({"filename": name, "split": split, "imgid": len(entries), "sentences": said})
    (folder / "dataset.json").write_text(json.dumps({"images": entries, "dataset": "scenes"}))
    return [f"retrieval.annotations={folder / 'dataset.json'}", f"data.images={folder / 'images'}"]


def vqa(folder: Path) -> list[str]:
    """Questions of all splits, annotations of train and val; the settings that name them."""
    settings = [f"data.images={folder / 'images'}", "vqa.answers_at_least=1"]
    for split, (count, seed) in SPLITS.items():
        scenes, subset = Scenes(count, seed), f"{split}2014"
        asked, labels = [], []
        for index in range(count):
            image_id = 1000 * seed + index
            picture(scenes, index, folder / f"images/{subset}/COCO_{subset}_{image_id:012d}.jpg")
            for number, (kind, question, answer) in enumerate(scenes.questions(index)[:4]):
                ids = {"image_id": image_id, "question_id": 10 * image_id + number}
                asked.append(ids | {"question": question})
                given = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
                labels.append(ids | {"question_type": kind, "answer_type": "other", "answers": given,
                                     "multiple_choice_answer": answer})  # fmt: skip
        files = {"questions": {"questions": asked}, "annotations": {"annotations": labels}}
        for what, content in files.items():
            if (split, what) == ("test", "annotations"):
                continue
            path = folder / f"{split}_{what}.json"
            path.write_text(json.dumps(content | {"data_subtype": subset}))
            settings.append(f"vqa.{split}_{what}={path}")
    return settings


def nlvr2(folder: Path) -> list[str]:
    """JSON lines of all splits, the test's without labels; the settings that name them."""
    settings = [f"data.images={folder / 'images'}"]
    for split, (count, seed) in SPLITS.items():
        scenes = Scenes(2 * count, seed)
        lines = []
        for index in range(count):
            sentence, label = scenes.pair_statement(2 * index, 2 * index + 1)
            for side in (0, 1):
                picture(scenes, 2 * index + side, folder / f"images/{split}/{split}-{index}-0-img{side}.png")
            line = {"identifier": f"{split}-{index}-0-0", "sentence": sentence}
            lines.append(line if split == "test" else line | {"label": str(label)})
        path = folder / f"{split}.json"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings.append(f"nlvr2.{split}={path}")
    return settings
