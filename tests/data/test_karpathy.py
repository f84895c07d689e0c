"""Karpathy's JSON: what is read, where images are looked for, what training gets of it, and what is wrong with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import retrieving
import sources
from hypothesis import given, settings
from hypothesis import strategies as st

from sacl_ds.data.batch import TrainingView
from sacl_ds.data.collate import Collator
from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.sample import BadSample
from sacl_ds.errors import UserError
from sacl_ds.tasks.examples import ExampleSource, example_order
from sacl_ds.tasks.retrieval.task import (
    CaptionedImage,
    EvaluationImages,
    TrainingPairs,
    as_sample,
    karpathy_images,
    retrieval_set,
)


def written(folder: Path, entries: object, name: str = "k.json") -> Path:
    (folder / name).write_text(json.dumps({"images": entries}))
    return folder / name


def entry(number: int, **more: object) -> dict[str, Any]:
    said = [{"raw": f" a thing {number} "}, {"raw": "another"}]
    return {"filename": f"{number}.jpg", "split": "train", "sentences": said, **more}


def test_coco_flickr_and_rest(tmp_path: Path) -> None:
    """COCO has folders and ids, Flickr neither; 'train' takes 'restval'."""
    said = [{"raw": "x", "sentid": 7}, {"raw": "y", "sentid": 9}]
    coco = entry(1, split="restval", filepath="val2014", cocoid=42, imgid=3, sentences=said)
    path = written(tmp_path, [entry(0), coco, entry(2, split="val")])
    first, second = karpathy_images(path, tmp_path / "i", "train")
    assert first == CaptionedImage(first.image, ["a thing 0", "another"], "0.jpg", None, None)
    assert second == CaptionedImage(second.image, ["x", "y"], "val2014/1.jpg", 42, [7, 9])
    assert first.image.places == (tmp_path / "i/0.jpg",)
    assert second.image.places == (tmp_path / "i/val2014/1.jpg", tmp_path / "i/1.jpg")
    assert [image.key for image in karpathy_images(path, tmp_path, "val")] == ["2.jpg"]
    assert retrieval_set([first, second], 0.0).coco is None
    names = retrieval_set([second, second], 0.0).coco
    assert names is not None
    assert (names.images.tolist(), names.captions.tolist()) == ([42, 42], [7, 9, 7, 9])


def test_either_place_will_do(tmp_path: Path) -> None:
    (image,) = karpathy_images(written(tmp_path, [entry(1, filepath="sub")]), tmp_path, "train")
    with pytest.raises(BadSample, match=r"image sub/1\.jpg: no file .*sub/1\.jpg or .*/1\.jpg"):
        as_sample(image)
    (tmp_path / "1.jpg").write_bytes(sources.image(1))
    sample = as_sample(image)
    assert (sample.captions, sample.picture.size) == (["a thing 1", "another"], (25, 16))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/1.jpg").write_bytes(sources.image(3))
    assert as_sample(image).picture.size == (27, 16)
    assert [each.key for each in EvaluationImages([image] * 3)[1:]] == ["sub/1.jpg"] * 2


def test_an_epoch_is_all_captions(tmp_path: Path) -> None:
    """Through loader and collator: every caption once, and those of an image share the first of their pair ids."""
    path = retrieving.karpathy(tmp_path, 7, "train", per_image=3)
    images = karpathy_images(path, tmp_path / "images", "train")
    (tmp_path / "images/val2014/6.png").unlink()
    pairs = TrainingPairs(images)
    assert len(pairs) == 21
    assert [sample.captions for sample in pairs[3:5]] == [["a red thing 1 0"], ["a red thing 1 1"]]
    assert {sample.image_bytes for sample in pairs[3:6]} == {b"val2014/1.png"}
    with pytest.raises(BadSample, match=r"image val2014/6\.png: no file"):
        pairs[20]
    view = retrieving.view([caption for image in images for caption in image.captions])
    collator = Collator(TrainingView(view.image, view.tokenizer), 0, None)  # type: ignore[arg-type]
    source = ExampleSource(TrainingPairs(images[:6]))
    loader = BatchLoader(source, example_order(source, 9, 0), collator, rank=0, world=1, workers=0)
    first, second = (batch for batch, _ in zip(loader, range(2), strict=False))
    said = sorted([*first.captions, *second.captions])
    assert said == sorted(caption for image in images[:6] for caption in image.captions)
    for batch in (first, second):
        for i, key in enumerate(batch.keys):
            same = [other == key for other in batch.keys]
            assert (batch.pair_ids[:, 0] == batch.pair_ids[i, 0]).tolist() == same
    assert any(len(set(batch.keys)) < 9 for batch in (first, second))


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(str.strip)
splits = st.sampled_from(["train", "restval", "val", "test"])


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(st.tuples(splits, st.lists(words, min_size=1)), max_size=9))
def test_any_captions_survive(drawn: list[tuple[str, list[str]]], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("k")
    entries = [
        entry(i, split=split, sentences=[{"raw": each} for each in said]) for i, (split, said) in enumerate(drawn)
    ]
    path = written(folder, entries)
    for split, taken in (("train", ("train", "restval")), ("val", ("val",)), ("test", ("test",))):
        expected = [(f"{i}.jpg", [c.strip() for c in said]) for i, (name, said) in enumerate(drawn) if name in taken]
        if expected:
            found = karpathy_images(path, folder, split)
            assert [(image.key, image.captions) for image in found] == expected
        else:
            with pytest.raises(UserError, match=f"no images in split '{split}'"):
                karpathy_images(path, folder, split)


def of(*entries: object) -> Callable[[Path], Path]:
    return lambda folder: written(folder, list(entries))


def raw(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "k.json").write_text(text)
        return folder / "k.json"

    return make


MISTAKES = {
    "no file": (lambda folder: folder / "no.json", r"cannot read .*no\.json: No such file"),
    "no JSON": (raw('{"images": [\n}'), r"k\.json line 2: not valid JSON"),
    "a list": (raw("[]"), r"k\.json is no Karpathy JSON: no list 'images' in it; give"),
    "images no list": (raw('{"images": {"a": 1}}'), r"no list 'images' in it"),
    "no split": (of(entry(0), {"filename": "x"}), r"k\.json is no Karpathy JSON: images\[1\]: 'split' is missing"),
    "split no text": (of(entry(0, split=3)), r"images\[0\]: not as expected: split is 3, not text"),
    "entry no object": (of(entry(0), [1]), r"images\[1\]: not as expected"),
    "no filename": (of(entry(0), {"split": "train", "sentences": []}), r"images\[1\]: 'filename' is missing"),
    "no sentences": (of({"split": "train", "filename": "x"}), r"images\[0\]: 'sentences' is missing"),
    "sentences null": (of(entry(0, sentences=None)), r"images\[0\]: not as expected"),
    "sentence no object": (of(entry(0, sentences=["a"])), r"images\[0\]: not as expected"),
    "no raw": (of(entry(0, sentences=[{"tokens": []}])), r"images\[0\]: 'raw' is missing"),
    "raw no text": (of(entry(0, sentences=[{"raw": None}])), r"images\[0\]: not as expected: raw is null, not text"),
    "cocoid no number": (of(entry(0, cocoid="x")), r"images\[0\]: not as expected: invalid literal"),
    "empty caption": (
        of(entry(0), entry(1, sentences=[{"raw": "a"}, {"raw": " "}])),
        r"k\.json: images\[1\] \(1\.jpg\): sentences\[1\] is empty; put it right",
    ),
    "no caption": (of(entry(0, sentences=[])), r"images\[0\] \(0\.jpg\): it has no sentences; put it right"),
    "half a surrogate pair": (
        of(entry(0, sentences=[{"raw": "a"}, {"raw": "a smile \ud83d"}])),
        r"k\.json: images\[0\] \(0\.jpg\): sentences\[1\]: text is not valid Unicode; put it right",
    ),
    "twice": (of(entry(0), entry(1), entry(0)), r"images\[2\] \(0\.jpg\): .* twice, before as images\[0\]"),
    "other splits": (of(entry(0, split="val"), entry(1, split="test")), "there are: test, val"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        karpathy_images(make(tmp_path), tmp_path, "train")
    assert "\n" not in str(error.value)
