"""The weights of a global batch against a dense computation in numpy, in one process and on two ranks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_weights import dense
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from ranks import on_ranks

from sacl_ds.losses import Regulation, tiles
from sacl_ds.losses.statistics import contrastive_statistics
from sacl_ds.losses.streaming import Job, joint_loss
from sacl_ds.losses.weighing import EDGES, Weighed, quantiles, weigh

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
}


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


@pytest.mark.parametrize("name", ["no teacher", "teacher and student", "less mass"])
def test_mass_and_log_weights_are_the_losses_own_figures(name: str) -> None:
    data, regulation = features(), REGULATIONS[name]
    teacher = (data["teacher_image"], data["teacher_text"]) if regulation.teacher else None
    scale = torch.tensor(SCALE, dtype=torch.float64)
    job = Job.of(data["image"], data["ids"], regulation, tiles, None)
    figures = contrastive_statistics(joint_loss((data["image"], data["text"]), scale, teacher, job)[1])
    images, texts = weighed(data, regulation)
    assert float(figures["negative_mass_log"]) == pytest.approx((images.mass + texts.mass) / 2, abs=1e-9)
    mean = (images.mean_log_weight + texts.mean_log_weight) / 2
    assert float(figures["pmi_negative_target"]) == pytest.approx(-mean, abs=1e-9)


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
