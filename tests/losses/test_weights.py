"""The weights of a global batch against a dense computation in numpy, in one process and on two ranks."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_weights import dense, information, matrices
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from ranks import on_ranks

from sacl_ds.losses import Regulation, similarity_regulated_loss
from sacl_ds.losses.distribution import EDGES, Weighed, quantiles, weigh
from sacl_ds.losses.weights import Contrast, WeightTiles, log_weights, mutual_information

PAIRS, LOWEST, SCALE = 23, 9, 14.0
REGULATIONS = {
    "no teacher": Regulation(0.0, 6.0, 0.0),
    "teacher and student": Regulation(0.4, 5.0, 9.0),
    "teacher alone": Regulation(1.0, 5.0, 8.0),
    "steep teacher, hardly any share": Regulation(1e-20, 0.0, 60.0),
    "less mass": Regulation(0.5, 5.0, 5.0, negative_mass=0.1),
    "light ones removed": Regulation(0.3, 6.0, 6.0, drop_below=0.6),
    "light ones removed, other mass": Regulation(0.0, 6.0, 6.0, negative_mass=0.5, drop_below=0.9),
    "infonce": Regulation(0.0, 0.0, 0.0),
    "even with less mass": Regulation(0.0, 0.0, 0.0, negative_mass=0.03),
    "even with a teacher": Regulation(0.5, 0.0, 0.0, negative_mass=0.3),
}
ALL_REMOVED = Regulation(0.0, 0.0, 0.0, drop_below=1.5)


def features() -> dict[str, torch.Tensor]:
    """Unit features in a cone, as trained models have them; two id columns, in both of which some pairs agree."""
    g = torch.Generator().manual_seed(3)
    made = [torch.randn(PAIRS, width, generator=g, dtype=torch.float64) for width in (12, 12, 7, 7)]
    made = [torch.nn.functional.normalize(x + 0.7, dim=1) for x in made]
    ids = torch.arange(PAIRS)[:, None].repeat(1, 2)
    ids[4, 0] = ids[9, 0] = ids[2, 0]
    ids[9, 1] = ids[17, 1]
    return dict(zip(("image", "text", "teacher_image", "teacher_text"), made, strict=True)) | {"ids": ids}


def assert_equal(got: Weighed, expected: dict[str, object], even: bool, tolerance: float = 1e-9) -> None:
    weights = np.asarray(expected["weights"])
    assert (got.anchors, got.pairs) == (expected["anchors"], expected["pairs"])
    # none of the raw weights lies on an edge but those that are all one number
    if not even:
        np.testing.assert_array_equal(got.histogram, np.histogram(weights, EDGES)[0])
    assert got.histogram.sum() == got.pairs
    np.testing.assert_allclose(got.under, [(weights < t).mean() for t in np.arange(1, 10) / 10])
    for name in ("effective", "effective_share", "mass", "shape", "mean_log_weight"):
        assert getattr(got, name) == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    assert got.lowest is not None
    if even:
        assert len(got.lowest) == 0
        return
    low = got.lowest
    table = list(zip(low.weight, low.anchor, low.negative, low.student, low.teacher, strict=True))
    assert [row[1:3] for row in table] == [row[1:3] for row in expected["lowest"]]  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.array(table), np.array(expected["lowest"]), rtol=tolerance, atol=tolerance)


def weighed(
    data: dict[str, torch.Tensor], regulation: Regulation, part: slice = slice(None), **more: object
) -> tuple[Weighed, Weighed]:
    teacher = data["teacher_image"][part], data["teacher_text"][part]
    options = {"teacher": teacher, "pair_ids": data["ids"][part], "regulation": regulation, "lowest": LOWEST} | more
    return weigh(data["image"][part], data["text"][part], SCALE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [5, 1024])
@pytest.mark.parametrize("name", REGULATIONS)
def test_one_process(name: str, tile: int) -> None:
    data, regulation = features(), REGULATIONS[name]
    for got, expected in zip(weighed(data, regulation, tile=tile), dense(data, regulation, SCALE, LOWEST), strict=True):
        assert_equal(got, expected, regulation.even and regulation.drop_below is None)


def test_the_cases_are_what_they_are_called() -> None:
    """Dropping drops some and keeps some; weights spread over many bins."""
    found = dense(features(), REGULATIONS["light ones removed"], SCALE, LOWEST)[0]["weights"]
    assert 0.05 < np.mean(np.asarray(found) == 0) < 0.7
    assert np.ptp(np.log(np.asarray(dense(features(), REGULATIONS["no teacher"], SCALE, LOWEST)[0]["weights"]))) > 1.5


def two_ranks(rank: int, folder: Path) -> None:
    data = features()
    part = slice(0, 8) if rank == 0 else slice(8, None)
    torch.save({name: weighed(data, r, part, tile=6) for name, r in REGULATIONS.items()}, folder / f"{rank}.pt")


def test_two_ranks_with_uneven_batches(tmp_path: Path) -> None:
    on_ranks(2, two_ranks, tmp_path)
    data = features()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, regulation in REGULATIONS.items():
            for got, expected in zip(found[name], dense(data, regulation, SCALE, LOWEST), strict=True):
                assert_equal(got, expected, regulation.even and regulation.drop_below is None)


def test_infonce_weighs_everything_one() -> None:
    for got in weighed(features(), REGULATIONS["infonce"]):
        assert got.histogram[np.searchsorted(EDGES, 1.0)] == got.pairs
        assert (got.under == 0).all()
        assert (got.mass, got.shape, got.mean_log_weight, got.effective_share) == (0, 0, 0, pytest.approx(1))
        assert got.lowest is not None
        assert len(got.lowest) == 0


def test_without_teacher_without_ids_and_nothing_lowest() -> None:
    data = features()
    data["ids"] = torch.arange(PAIRS)[:, None]
    regulation = REGULATIONS["no teacher"]
    plain = weighed(data, regulation, teacher=None, pair_ids=None)
    for got, expected in zip(plain, dense(data, regulation, SCALE, LOWEST), strict=True):
        assert got.pairs == PAIRS * (PAIRS - 1)
        assert got.shape == pytest.approx(expected["shape"])
        assert got.lowest is not None
        assert np.isnan(got.lowest.teacher).all()
    assert weighed(data, regulation, lowest=0)[0].lowest is None
    with pytest.raises(ValueError, match="needs the teacher's features"):
        weighed(data, REGULATIONS["teacher alone"], teacher=None)


def test_anchors_without_negatives() -> None:
    data, regulation = {name: x[:6] for name, x in features().items()}, REGULATIONS["no teacher"]
    data["ids"] = torch.tensor([[0, 7]] * 6)
    for got in weighed(data, regulation):
        assert (got.anchors, got.pairs, got.histogram.sum()) == (6, 0, 0)
        assert np.isnan([got.effective, got.mass, got.shape, got.mean_log_weight, *got.under]).all()
        assert got.lowest is not None
        assert len(got.lowest) == 0
    # pair 0 shares its first id with 1 and its second with the others, which share theirs: 1 and they stay negatives
    data["ids"] = torch.tensor([[0, 7], [0, 1], [2, 7], [2, 7], [2, 7], [5, 7]])
    for got, expected in zip(weighed(data, regulation), dense(data, regulation, SCALE, LOWEST), strict=True):
        assert got.pairs == 8
        assert_equal(got, expected, False)


def test_half_precision_features_and_a_learned_scale() -> None:
    """Whatever the features' type, products are of float32 at least."""
    data = {name: x if name == "ids" else x.bfloat16() for name, x in features().items()}
    regulation = REGULATIONS["teacher and student"]
    scale = torch.nn.Parameter(torch.tensor(SCALE))
    teacher = data["teacher_image"], data["teacher_text"]
    got = weigh(data["image"], data["text"], scale, teacher=teacher, pair_ids=data["ids"], regulation=regulation)
    exact = {name: x if name == "ids" else x.double() for name, x in data.items()}
    for one, expected in zip(got, dense(exact, regulation, SCALE, LOWEST), strict=True):
        for name in ("effective", "mass", "shape", "mean_log_weight"):
            assert getattr(one, name) == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def logged(data: dict[str, torch.Tensor], regulation: Regulation, part: slice, backend: str) -> dict[str, float]:
    """The figures that a loss over this part of the pairs, as one rank's, gives to the log."""
    teacher = [data["teacher_image"][part], data["teacher_text"][part]] if regulation.alpha else [None, None]
    out = similarity_regulated_loss(
        data["image"][part], data["text"][part], torch.tensor(SCALE, dtype=torch.float64), *teacher,
        alpha=regulation.alpha, sharpness=regulation.sharpness, teacher_sharpness=regulation.teacher_sharpness,
        pair_ids=data["ids"][part], negative_mass=regulation.negative_mass, drop_below=regulation.drop_below,
        backend=backend, statistics=True,
    )  # fmt: skip
    assert out.statistics is not None
    return {name: float(value) for name, value in out.statistics.items()}


def assert_log_is_record(
    log: dict[str, float], record: tuple[Weighed, Weighed], data: dict[str, torch.Tensor], regulation: Regulation
) -> None:
    images, texts = record
    if images.pairs and (regulation.drop_below or 1) <= 1:  # in both directions as many anchors have some that weighs
        assert log["negative_mass_log"] == pytest.approx((images.mass + texts.mass) / 2, rel=1e-13, abs=1e-15)
    if images.pairs and regulation.drop_below is None:  # and as many pairs weigh
        mean = (images.mean_log_weight + texts.mean_log_weight) / 2
        assert log["pmi_negative_target"] == pytest.approx(-mean, rel=1e-12, abs=1e-14)
    assert log["negatives"] * images.anchors == pytest.approx(images.pairs, rel=1e-14)
    assert log == pytest.approx(information(data, regulation, SCALE), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("name", REGULATIONS)
def test_the_log_says_what_the_record_says(name: str, backend: str) -> None:
    data, regulation = features(), REGULATIONS[name]
    log = logged(data, regulation, slice(None), backend)
    assert_log_is_record(log, weighed(data, regulation), data, regulation)


def random_case(seed: int) -> tuple[dict[str, torch.Tensor], Regulation, int]:
    """A batch whose ids often agree, settings, and where its pairs are parted between two ranks."""
    g = np.random.default_rng(seed)
    n = int(g.integers(2, 16))
    made = [torch.from_numpy(g.standard_normal((n, width)) + 0.3) for width in (6, 6, 4, 4)]
    made = [torch.nn.functional.normalize(x, dim=1) for x in made]
    alpha, drop = float(g.choice([0, 0.3, 1])), float(g.choice([0, 0.4, 0.9])) or None
    regulation = Regulation(alpha, *g.uniform(0, 12, 2).tolist(), float(g.choice([1.0, 0.2])), drop)
    names = ("image", "text", "teacher_image", "teacher_text")
    ids = torch.from_numpy(g.integers(0, 2 * n, (n, 2)))
    return dict(zip(names, made, strict=True)) | {"ids": ids}, regulation, int(g.integers(1, n))


def test_removing_negatives_leaves_what_infonce_is_told_by() -> None:
    """InfoNCE's bound does not know of weights; the mass of what is left does."""
    data = features()
    plain = logged(data, REGULATIONS["infonce"], slice(None), "streaming")
    dropped = logged(data, REGULATIONS["light ones removed"], slice(None), "streaming")
    assert dropped["infonce_bound"] == pytest.approx(plain["infonce_bound"], rel=1e-13)
    assert dropped["negatives"] == plain["negatives"]
    assert plain["negative_mass_log"] == 0
    assert dropped["negative_mass_log"] < -0.1


def log_and_record(rank: int, folder: Path) -> None:
    every = [(features(), regulation, 8) for regulation in (*REGULATIONS.values(), ALL_REMOVED)]
    every += map(random_case, range(20))
    found = []
    for data, regulation, border in every:
        part = slice(border, None) if rank else slice(0, border)
        record = weighed(data, regulation, part, tile=1024)
        found.append((logged(data, regulation, part, "streaming"), record, data, regulation))
        for one, other in zip(weighed(data, regulation, part, tile=3), record, strict=True):
            assert one.mass == pytest.approx(other.mass, rel=1e-12, abs=1e-12, nan_ok=True)
    torch.save(found, folder / f"{rank}.pt")


def test_the_log_says_what_the_record_says_on_two_ranks(tmp_path: Path) -> None:
    on_ranks(2, log_and_record, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert len(found[0]) == len(REGULATIONS) + 21
    for (log, record, data, regulation), (other, *_) in zip(*found, strict=True):
        assert log == other
        assert_log_is_record(log, record, data, regulation)
        for got, expected in zip(record, quiet_dense(data, regulation), strict=True):
            for name in ("effective", "effective_share", "mass", "shape", "mean_log_weight"):
                assert getattr(got, name) == pytest.approx(expected[name], rel=1e-9, abs=1e-9, nan_ok=True), name


def quiet_dense(data: dict[str, torch.Tensor], regulation: Regulation) -> list[dict[str, Any]]:
    """Also where no negative weighs, and means are NaN."""
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dense(data, regulation, SCALE, LOWEST)


SHARPNESS = st.floats(0, 40) | st.sampled_from([0.0, 1.0, 100.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], Regulation, int]:
    """A batch of 1 to 10 pairs, of which many share ids, settings, and the size of a tile."""
    n, seed = draw(st.integers(1, 10)), draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, width, generator=g, dtype=torch.float64) for width in (5, 5, 4, 4)]
    made = [torch.nn.functional.normalize(x, dim=1) for x in made]
    ids = torch.randint(0, draw(st.integers(1, 40)), (n, draw(st.integers(1, 3))), generator=g)
    alpha = draw(st.sampled_from([0.0, 1.0, 1e-12]) | st.floats(0, 1))
    drop = draw(st.none() | st.floats(0.01, 3))
    regulation = Regulation(alpha, draw(SHARPNESS), draw(SHARPNESS), draw(st.floats(0.01, 5)), drop)
    names = ("image", "text", "teacher_image", "teacher_text")
    return dict(zip(names, made, strict=True)) | {"ids": ids}, regulation, draw(st.sampled_from([2, 5, 16]))


@settings(max_examples=100, deadline=None)
@given(cases(), st.booleans())
def test_every_tile_has_the_weights_of_the_dense_matrix(
    case: tuple[dict[str, torch.Tensor], Regulation, int], fast: bool
) -> None:
    data, regulation, size = case
    teacher = data["teacher_image"], data["teacher_text"]
    tiles = WeightTiles(
        Contrast.of_batch(data["image"], data["text"], teacher, data["ids"]), regulation, size, fast=fast
    )
    n = len(data["image"])
    seen = torch.zeros(n, n, dtype=torch.int64)
    found = torch.full((2, n, n), torch.nan, dtype=torch.float64)
    for tile in tiles:
        assert tile.cosine.shape[0] <= size
        assert tile.cosine.shape[1] <= size
        seen[tile.rows, tile.columns] += 1
        for direction in range(2):
            found[direction, tile.rows, tile.columns] = tile.log_weight(direction).double()
    assert (seen == 1).all()
    tolerance = 1e-4 if fast else 1e-10
    for direction, (w, negative, c, t) in enumerate(matrices(data, regulation)):
        got = (found[direction].T if direction else found[direction]).exp().numpy()
        whole = log_weights(
            *(torch.from_numpy(x.copy()) for x in (c, negative)), regulation, torch.from_numpy(t.copy())
        )
        assert (got[~negative] == 0).all()
        np.testing.assert_array_equal(tiles.negatives[direction].numpy(), negative.sum(1))
        near = np.zeros_like(negative)
        if regulation.drop_below is not None:  # a weight just at the bound may fall on either side of it
            undropped = list(matrices(data, replace(regulation, drop_below=None, negative_mass=1.0)))[direction][0]
            near = np.isclose(undropped, regulation.drop_below, rtol=1e-4)
        np.testing.assert_allclose(np.where(near, 0, got), np.where(near, 0, w), rtol=tolerance, atol=1e-30)
        np.testing.assert_allclose(np.where(near, 0, whole.exp().numpy()), np.where(near, 0, w), rtol=1e-10, atol=1e-30)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_reductions_equal_the_dense_matrix(case: tuple[dict[str, torch.Tensor], Regulation, int]) -> None:
    data, regulation, size = case
    assume(regulation.drop_below is None or not near_the_bound(data, regulation))
    expected, wanted = quiet_dense(data, regulation), information(data, regulation, SCALE)
    record = weighed(data, regulation, tile=size)
    for got, known in zip(record, expected, strict=True):
        assert (got.anchors, got.pairs) == (known["anchors"], known["pairs"])
        for name in ("effective", "effective_share", "mass", "shape", "mean_log_weight"):
            assert getattr(got, name) == pytest.approx(known[name], rel=1e-8, abs=1e-8, nan_ok=True), name
        assert got.lowest is not None
        if not regulation.even:
            weight = [row[0] for row in known["lowest"]]
            np.testing.assert_allclose(got.lowest.weight, weight, rtol=1e-10, atol=1e-300)
    teacher = data["teacher_image"], data["teacher_text"]
    contrast = Contrast.of_batch(data["image"], data["text"], teacher, data["ids"])
    figures = mutual_information(WeightTiles(contrast, regulation, size), SCALE)
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def near_the_bound(data: dict[str, torch.Tensor], regulation: Regulation) -> bool:
    """Whether rounding may decide that a negative is removed."""
    whole = [w[negative] for w, negative, *_ in matrices(data, replace(regulation, drop_below=None, negative_mass=1.0))]
    return bool(np.isclose(np.concatenate(whole), regulation.drop_below, rtol=1e-9).any())


def test_fast_tiles_have_their_range() -> None:
    data = features()
    contrast = Contrast.of_batch(data["image"], data["text"])
    assert next(iter(WeightTiles(contrast, Regulation(0.0, 80.0), fast=True))).log_weight(0).dtype == torch.float32
    assert next(iter(WeightTiles(contrast, Regulation(0.0, 81.0), fast=True))).log_weight(0).dtype == torch.float64
    with pytest.raises(ValueError, match="a sharpness of 601 leaves the range of numbers"):
        WeightTiles(contrast, Regulation(0.0, 601.0), fast=True)


weights = arrays.arrays(
    np.float64, st.integers(1, 60), elements=st.floats(1e-6, 1e4) | st.sampled_from([0.0, 1.0, 0.1])
)


@settings(max_examples=200, deadline=None)
@given(weights, st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_quantiles_lie_in_the_bin_of_the_raw_ones_and_rise(raw: np.ndarray, qs: Sequence[float]) -> None:
    qs = sorted(qs)
    got = quantiles(np.histogram(raw, EDGES)[0], qs)
    assert (np.diff(got) >= -1e-12 * got[1:]).all()
    # numpy's rounding of q * n may take the next order statistic: one of the two
    for value, q in zip(got, qs, strict=True):
        ends = np.quantile(raw, np.clip([q - 1e-9, q + 1e-9], 0, 1), method="inverted_cdf")
        places = np.searchsorted(EDGES, ends, side="right") - 1
        assert any(EDGES[place] * (1 - 1e-12) <= value <= EDGES[place + 1] * (1 + 1e-12) for place in places), (
            value,
            q,
            ends,
        )


def test_quantiles_of_nothing() -> None:
    assert np.isnan(quantiles(np.zeros(len(EDGES) - 1, np.int64), [0.1, 0.5])).all()
