"""The report of a run: its numbers, and its page as a browser sees it."""

import argparse
import base64
import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from documented import assert_documented
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from saved import saved_run
from starting import start
from tars import jpeg, write_tar

from sacl_ds.analysis.commands import add_parsers
from sacl_ds.analysis.pairs import Pairs
from sacl_ds.analysis.report import sections
from sacl_ds.analysis.report.examples import gallery, lowest_of, side_by_side
from sacl_ds.analysis.report.page import Card, Section, Strip, clean, percent, render, shown
from sacl_ds.analysis.report.sections import SceneTruth
from sacl_ds.analysis.subject import data_source, load_subject, read_pairs
from sacl_ds.config import RunConfig
from sacl_ds.data.scenes import Scenes
from sacl_ds.errors import UserError
from sacl_ds.losses import Regulation
from sacl_ds.telemetry.records import FIGURES, read_figures, read_lowest

ITC = ["loss.matching_weight=0", "loss.mlm_weight=0"]
LONG = "endless " * 3000
AWKWARD = [
    "<script>console.error('escaped?')</script><img src=http://127.0.0.1:1/x.png>",
    "quotes \" and ' and & and &lt; and {{ 7 * 7 }} {% if %}",
    LONG,
    "ohneleerzeichen" * 400,
    "Ein Mädchen — 女孩 🙂 👩‍👩‍👧",
    "עברית ثم العربية",
    "left \u202eright to left without end",
    "nul\x00 bell\x07 escape\x1b[31m tab\t",
    "$\\frac{1}{0}$ and $unclosed",
    "z̸̢̛͚̟͊͠ä̴́lgo" + "\u0301" * 500,
]
HALF = "half a pair \ud83d of surrogates"  # which JSON can spell


@pytest.fixture(scope="module")
def browser():
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here")
    with Browser(executable) as opened:
        yield opened


def report(*arguments: str | Path) -> None:
    """As tools/weight_analysis.py would, without the seconds in which a new process imports everything."""
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    options = parser.parse_args(["report", *map(str, arguments)])
    options.act(options)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on scenes with its report, against another run."""
    base = tmp_path_factory.mktemp("reported")
    run = base / "run"
    start(run, *ITC, "train.steps=7", "records.every=3", "records.lowest=40", "loss.sharpness=4", "train.log_every=2",
          "train.save_every=4")  # fmt: skip
    other = saved_run(base / "other", 5, teacher=False)
    report(run, "--against", other)
    return run


def figures_of(run: Path) -> dict:
    return json.loads((run / "report/report.json").read_text())


def test_the_page_of_a_run(scenes: Path, browser: Browser) -> None:
    page = scenes / "report/report.html"
    for width, dark in ((1280, False), (420, False), (1280, True)):
        seen = browser.look(page, width=width, dark=dark)
        assert seen.problems() == []
        assert len(seen.images) > 60
    text = page.read_text()
    named = re.findall(r'<section id="(\w+)">', text)
    assert named == [
        "run", "weights", "training", "information", "matrix", "gallery", "retrieval", "duplicates"
    ]  # fmt: skip
    assert all(f'href="#{name}"' in text for name in named)


def test_pictures_as_files(scenes: Path) -> None:
    """Every drawn picture of the page is a PNG in pictures/ too; the tables of pictures are there as sheets."""
    folder = scenes / "report/pictures"
    embedded = {
        base64.b64decode(data)
        for data in re.findall(
            r'class="plot">.*?src="data:image/png;base64,([^"]+)"', (folder.parent / "report.html").read_text(), re.S
        )
    }
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(embedded) == 9
    assert embedded <= set(files.values())
    assert files.keys() >= {"weights_histogram.png", "weight_matrix.png", "gallery.png", "retrieval.png"}
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 5, path  # not blank


def test_numbers_are_those_of_the_records(scenes: Path) -> None:
    figures, records, lowest = figures_of(scenes), read_figures(scenes), read_lowest(scenes)
    assert sorted({r["step"] for r in records}) == [1, 3, 6, 7]
    assert len(figures["training"]["records"]) == len(records) == 8
    last = {r["direction"]: r for r in records if r["step"] == 7}
    for shown_, kept in [*zip(figures["training"]["records"], records, strict=True),
                         *((figures["weights"]["directions"][d], r) for d, r in last.items())]:  # fmt: skip
        for name in FIGURES.names:
            expected = kept[name]
            if isinstance(expected, float) and np.isnan(expected):
                assert shown_[name] is None
            else:
                assert shown_[name] == expected, name
    assert sum(figures["weights"]["directions"]["image_to_text"]["histogram"]) == last["image_to_text"]["pairs"]

    entries = [entry for group in figures["gallery"]["groups"] for entry in group["entries"]]
    assert len(entries) >= 20
    by_place = {(r["direction"], r["place"]): r for r in lowest}
    for entry in entries:
        kept = by_place[entry["direction"], entry["place"]]
        assert {name: entry[name] for name in kept} == kept
    for direction in ("image_to_text", "text_to_image"):  # the lightest of all is there
        assert by_place[direction, 0]["weight"] == min(e["weight"] for e in entries if e["direction"] == direction)
    metrics = [json.loads(line) for line in (scenes / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in metrics if "pmi_positive" in line]
    assert figures["information"]["pmi_positive"] == {
        "step": [line["step"] for line in logged],
        "value": [line["pmi_positive"] for line in logged],
    }
    evaluation = [line for line in metrics if "evaluation" in line][-1]
    assert figures["run"]["evaluation"]["values"] == evaluation["evaluation"]


def test_truth_is_that_of_the_scenes(scenes: Path) -> None:
    """Against the table of all captions and all pictures of a set that holds the recorded ones."""
    figures = figures_of(scenes)
    entries = [entry for group in figures["gallery"]["groups"] for entry in group["entries"]]
    for entry in entries[:12]:
        text, image = ("negative", "anchor") if entry["direction"] == "image_to_text" else ("anchor", "negative")
        key, other = entry[f"{text}_key"], entry[f"{image}_key"]
        assert key[:4] == other[:4] == "0001"
        index, place = int(key[4:]), int(other[4:])
        whole = Scenes(max(index, place) + 1, 1)
        row = [caption.text for caption in whole.captions(index)].index(entry[f"{text}_caption"])
        assert whole.key(index) == key
        expected = _relevance(whole, index, row, place)
        assert entry["relevance"] == pytest.approx(expected)
    every = [_of_entry(entry) for entry in read_lowest(scenes)]
    assert figures["gallery"]["false_negatives"] == pytest.approx(np.mean([value == 1.0 for value in every]))


def _relevance(scenes: Scenes, index: int, row: int, place: int) -> float:
    """What of the caption holds, said by hand: no use of the package's own table."""
    caption, scene = scenes.captions(index)[row], scenes.scene(place)
    best = 0
    for first in scene.objects:
        for second in scene.objects:
            if first is second:
                continue
            pair = (first, second)
            held = sum(
                said == pair[number][part]
                for number, thing in enumerate(caption.described)
                for part, said in enumerate(thing)
                if said != -1
            )
            if caption.relation != -1:
                (row_a, column_a), (row_b, column_b) = (divmod(thing[4], 3) for thing in pair)
                held += [column_a < column_b, column_a > column_b, row_a < row_b, row_a > row_b][caption.relation]
            best = max(best, held)
    best += caption.background == scene.background
    return best / caption.statements


def _of_entry(entry: dict) -> float:
    text, image = ("negative", "anchor") if entry["direction"] == "image_to_text" else ("anchor", "negative")
    index, place = int(entry[f"{text}_key"][4:]), int(entry[f"{image}_key"][4:])
    whole = Scenes(max(index, place) + 1, 1)
    row = [caption.text for caption in whole.captions(index)].index(entry[f"{text}_caption"])
    return _relevance(whole, index, row, place)


def test_the_mini_batch_and_the_retrieval(scenes: Path) -> None:
    """Against plain numpy on the features of the held-out pairs."""
    figures = figures_of(scenes)
    subject = load_subject(scenes)
    pairs = read_pairs(subject, data_source(subject.run, None), 20)
    chosen = np.random.default_rng(0).permutation(20)[:16]
    student = pairs.image[chosen].astype(float) @ pairs.text[chosen].astype(float).T
    teacher = pairs.teacher_image[chosen].astype(float) @ pairs.teacher_text[chosen].astype(float).T
    ids = pairs.pair_ids[chosen]
    negatives = ~(ids[:, None] == ids[None]).any(-1)
    inverse = np.where(negatives, 1 / (0.5 * np.exp(4 * teacher) + 0.5 * np.exp(4 * student)), 0)
    expected = {
        "image_to_text": inverse / inverse.sum(1, keepdims=True) * negatives.sum(1, keepdims=True),
        "text_to_image": (inverse / inverse.sum(0) * negatives.sum(0)).T,
    }
    keys = [pairs.keys[i] for i in chosen]
    picked = [keys.index(key) for key in figures["matrix"]["keys"]]
    assert len(picked) == 8
    for direction, weights in expected.items():
        np.testing.assert_allclose(figures["matrix"][direction], weights[np.ix_(picked, picked)], rtol=1e-4)
    lightest = np.unravel_index(np.argmin(np.where(negatives, expected["image_to_text"], np.inf)), (16, 16))
    assert picked[:2] == list(map(int, lightest))

    whole = Scenes(20, 1001)
    index = {key: whole.key(i) for i, key in enumerate(pairs.keys)}
    assert list(index) == list(index.values())
    relevant = np.array([[_relevance(whole, i, 0, j) == 1 for j in range(20)] for i in range(20)])
    scores = pairs.text @ pairs.image.T
    precision = []
    for row, true in zip(scores, relevant, strict=True):
        ranked = true[np.argsort(-row)]
        precision.append(np.mean([ranked[: place + 1].mean() for place in np.flatnonzero(ranked)]))
    assert set(figures["retrieval"]["figures"]) == {"run", "other"}
    assert figures["retrieval"]["figures"]["run"]["mAP"] == pytest.approx(np.mean(precision))
    for query in figures["retrieval"]["queries"]:
        at = pairs.keys.index(query["key"])
        assert query["runs"]["run"]["average_precision"] == pytest.approx(precision[at])
        assert query["runs"]["run"]["images"] == [pairs.keys[i] for i in np.argsort(-scores[at])[:5]]
        assert query["runs"]["run"]["true"] == [bool(relevant[at, i]) for i in np.argsort(-scores[at])[:5]]
    gaps = [abs(q["runs"]["run"]["average_precision"] - q["runs"]["other"]["average_precision"])
            for q in figures["retrieval"]["queries"]]  # fmt: skip
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on shards whose captions are anything at all; of held-out ones, any that can be used."""
    base = tmp_path_factory.mktemp("sharded")
    usable = [caption for caption in AWKWARD if "\0" not in caption]
    for name, first, captions in (("train", 0, [*AWKWARD, HALF]), ("val", 1, usable)):
        samples = []
        for i in range(24):
            caption = captions[(i + first) % len(captions)]
            fields = {"jpg": jpeg(37 * i + first, (40 + 400 * (i == 3), 30 + 300 * (i == 4)))}
            if caption is HALF:
                fields["json"] = json.dumps({"caption": caption}).encode()
            else:
                fields["txt"] = caption.encode()
            samples.append((f"{name}<{i}>&", fields))
        write_tar(base / f"{name}.tar", samples)
    data = ["data.source=shards", f"data.shards={base}/train.tar", f"data.eval_shards={base}/val.tar"]
    start(
        base / "run", *ITC, *data, "train.steps=2", "teacher.steps=0", "train.global_batch_size=20", "loss.sharpness=5"
    )
    return base


def test_awkward_captions(shards: Path, browser: Browser) -> None:
    run = shards / "run"
    report(run, "--against", saved_run(shards / "other", 5, teacher=False))
    page = run / "report/report.html"
    for width in (1280, 420):
        seen = browser.look(page, width=width)
        assert seen.problems() == []
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;console.error(&#39;escaped?&#39;)" in text
    assert "{{ 7 * 7 }}" in text
    assert "女孩 🙂 👩‍👩‍👧" in text
    assert LONG[:400] not in text
    assert "picture not found" not in text
    figures = figures_of(run)
    assert figures["gallery"]["pictures_found"] == figures["gallery"]["pictures_wanted"] > 4
    assert "false_negatives" not in figures["gallery"]
    recorded = {entry["anchor_caption"] for entry in read_lowest(run)}
    assert {e["anchor_caption"] for g in figures["gallery"]["groups"] for e in g["entries"]} <= recorded


def test_training_shards_that_are_gone(shards: Path, tmp_path: Path, browser: Browser) -> None:
    """The gallery is then of held-out pairs, and says so."""
    run = shards / "run"
    (shards / "train.tar").rename(tmp_path / "train.tar")
    try:
        report(run, "--out", tmp_path / "report")
    finally:
        (tmp_path / "train.tar").rename(shards / "train.tar")
    text = (tmp_path / "report/report.html").read_text()
    assert "The training shards cannot be reached" in text
    figures = json.loads((tmp_path / "report/report.json").read_text())
    entries = [entry for group in figures["gallery"]["groups"] for entry in group["entries"]]
    assert {entry["anchor_shard"] for entry in entries} == {f"{shards}/val.tar"}
    assert browser.look(tmp_path / "report/report.html").problems() == []


def test_a_run_that_is_not_finished(scenes: Path, tmp_path: Path, browser: Browser) -> None:
    run = shutil.copytree(
        scenes, tmp_path / "running", ignore=shutil.ignore_patterns("report", "model.safetensors", "checksums.json")
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "caution": "<b>sharpness</b> nears the logit scale"}) + "\n")
    for path in (run / "weights").iterdir():  # a single record
        if not path.stem.endswith("1"):
            path.unlink()
    report(run)
    text = (run / "report/report.html").read_text()
    assert "not finished" in text
    assert "&lt;b&gt;sharpness&lt;/b&gt; nears" in text
    assert 'id="matrix"' not in text
    assert 'id="gallery"' in text
    assert browser.look(run / "report/report.html").problems() == []
    assert figures_of(run)["duplicates"]["cautions"] == [
        {"step": 6, "caution": "<b>sharpness</b> nears the logit scale"}
    ]


def test_a_checkpoint_of_a_run(scenes: Path, tmp_path: Path) -> None:
    """The records up to its step, and its own weights, in a finished run as in one that is not."""
    run = shutil.copytree(scenes, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (run / "model.safetensors").unlink()
    report(run / "checkpoints/step_00000004")
    assert {path.name for path in run.glob("report*")} == {"report_step_00000004"}
    figures = json.loads((run / "report_step_00000004/report.json").read_text())
    assert figures["weights"]["step"] == 3
    text = (run / "report_step_00000004/report.html").read_text()
    assert "not finished" not in text
    assert 'id="matrix"' in text
    (run / "checksums.json").unlink()
    for path in sorted((run / "weights").glob("*_0000000[12].parquet")):
        path.unlink()
    for name in ("latest", "step_00000002"):
        with pytest.raises(UserError) as error:
            report(run / "checkpoints" / name)
        assert_documented(f"error: {error.value}".replace(str(tmp_path), "/data"))


def test_mistakes(scenes: Path, tmp_path: Path) -> None:
    bare = saved_run(tmp_path / "bare", 1, teacher=False)
    for arguments, said in (
        ((bare,), "holds no weight records; train with records.every="),
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        ((scenes, "--against", tmp_path / "nowhere"), "nowhere"),
        ((scenes, "--against", scenes), "is the run itself"),
        ((scenes, "--shards", "missing.tar"), "missing.tar does not exist"),
        ((scenes, "--pairs", "1"), "--pairs 1: at least two"),
        ((scenes, "--teacher", tmp_path / "nowhere"), "--teacher"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            report(*arguments, "--out", tmp_path / "out")
        assert "\n" not in str(caught.value)


@given(st.text(st.characters(), max_size=800), st.integers(1, 400))
def test_captions_are_made_fit(text: str, longest: int) -> None:
    kept = clean(text, longest)
    assert len(kept) <= longest
    assert kept == clean(kept, longest)
    kept.encode("utf-8")
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in kept)
    page = render("t", "s", [], [Section("a", "A", strips=[Strip(kept, [Card(None, kept)])])])
    assert page.count("<figure") == 1
    assert page.count("<section") == 1


def test_numbers_for_readers() -> None:
    values = {0.12345: "0.123", 1.0: "1", 12.5: "12.5", -0.0619: "−0.0619", 1234567: "1\u202f234\u202f567",
              1e-7: "1.00e−07", float("nan"): "–", 0.5: "0.500"}  # fmt: skip
    assert {value: shown(value) for value in values} == values
    shares = {0.0: "0.0\u202f%", 0.5: "50.0\u202f%", 0.00123: "0.12\u202f%", float("nan"): "–"}
    assert {value: percent(value) for value in shares} == shares


def test_information_from_records_where_the_log_has_none(tmp_path: Path) -> None:
    nan = float("nan")
    record = {"direction": "image_to_text", "pmi_positive": 1.5, "pmi_negative": nan, "pmi_negative_target": nan,
              "infonce_bound": nan}  # fmt: skip
    figures = [{**record, "step": 1}, {**record, "step": 2, "pmi_positive": nan}]
    section = sections.information(figures, [{"step": 3, "itc": 1.0}], tmp_path)
    assert section is not None
    assert section.numbers == {"source": "weights/", "pmi_positive": {"step": [1], "value": [1.5]}}
    assert sections.information([{**record, "step": 1, "pmi_positive": nan}], [], tmp_path) is None


def test_duplicates_of_the_log() -> None:
    metrics = [{"step": step, "duplicate_pairs": count} for step, count in ((1, 0), (2, 3), (3, 1))]
    section = sections.duplicates([], metrics, 10)
    assert section.numbers == {"steps": 3, "steps_with_duplicates": 2, "mean": pytest.approx(4 / 3),
                               "largest": {"step": 2, "duplicate_pairs": 3}, "cautions": []}  # fmt: skip
    assert "of 45 that a batch of 10 has" in section.text[0]


def test_lightest_of_held_out_pairs(tmp_path: Path) -> None:
    """In the form of records; where all weigh the same there are none."""
    rng = np.random.default_rng(0)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 9, 4)).astype(np.float32))
    names = [str(i) for i in range(9)]
    pairs = Pairs(names, [""] * 9, names, image, text, None, None, np.arange(9)[:, None], 10.0)
    entries = lowest_of(pairs, Regulation(sharpness=3.0), 5)
    inverse = np.exp(-3 * image.astype(float) @ text.astype(float).T)
    np.fill_diagonal(inverse, 0)
    for direction, table in (("image_to_text", inverse), ("text_to_image", inverse.T)):
        weights = table / table.sum(1, keepdims=True) * 8
        found = [entry for entry in entries if entry["direction"] == direction]
        assert [entry["place"] for entry in found] == list(range(5))
        assert [e["weight"] for e in found] == pytest.approx(np.sort(weights[weights > 0])[:5])
        for entry in found:
            assert weights[int(entry["anchor_key"]), int(entry["negative_key"])] == pytest.approx(entry["weight"])
    assert lowest_of(pairs, Regulation(sharpness=0.0), 5) == []
    section = gallery([], lambda wanted: {}, None, tmp_path, "origin")
    assert section.text == ["All negatives weigh the same in this run, so that none is the lightest."]
    side = side_by_side([("a", pairs), ("b", pairs)], lambda wanted: {}, None, tmp_path)
    assert side.numbers["figures"]["a"] == side.numbers["figures"]["b"]


def test_keys_of_no_scene() -> None:
    truth = SceneTruth(RunConfig())
    assert truth.picture("photo") is None
    assert truth.relevance("0001000000003", "no caption of that scene", "0001000000004") is None
    written = Scenes(4, 1).captions(3)[0].text
    assert truth.relevance("0001000000003", written, "0001000000003") == 1.0
    assert truth.relevance("0001000000003", written, "x.jpg") is None
