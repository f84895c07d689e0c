"""The study: each arm's loss against plain numpy, plans that are checked, trials that are run once and kept."""

import csv
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import prepared
from starting import program
from weight_study.plan import Arm, Plan, read_plan
from weight_study.runner import finished, run_plan
from weight_study.summary import ArmSummary, rows, verdict
from weight_study.trial import Folder
from weight_study.weights import DirectionSimilarities, contrastive, log_weights

from sacl_ds.analysis.calibrate import sharpness_for
from sacl_ds.errors import UserError
from sacl_ds.evaluation.metrics import ndcg
from sacl_ds.losses import Regulation, similarity_regulated_loss
from sacl_ds.training.false_share import falling_weights

N, SCALE = 13, 9.0
TINY = {
    "common": {
        "scenes": 150, "eval_scenes": 40, "eval_captions": 2, "steps": 6, "batch": 16, "warmup": 2, "width": 16,
        "stem_steps": 5,
    },
    "seeds": [0, 1],
    "arms": {
        "student": {"family": "regulated", "weights": "sacl", "teacher": "clean", "teacher_sharpness": 30, "fall": 0.1},
        "calibrated": {
            "family": "regulated", "weights": "sacl", "teacher": "clean",
            "teacher_sharpness": {"share": 0.2, "under": 0.7},
        },
        "plain": {"family": "infonce"},
        "same as plain": {"family": "control", "weights": "even"},
        "own average": {"family": "regulated", "weights": "sacl", "teacher": "average", "teacher_sharpness": 3},
        "constant": {"family": "control", "mass": 0.3, "scale": 30},
        "clean": {"family": "teacher", "captions": "detailed", "steps": 4},
        "oracle": {"family": "oracle", "weights": "matches"},
    },
    "sweeps": {"scale": {"plain": 14, "constant": 30}},
}  # fmt: skip


def unit(seed: int, n: int = N, d: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def sides() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """image, text, teacher's image and text, ids of which two are equal."""
    ids = torch.arange(N)
    ids[5] = ids[2]
    return unit(1), unit(2), unit(3), unit(4), ids


def direction(relevance: torch.Tensor | None = None) -> DirectionSimilarities:
    image, text, t_image, t_text, ids = sides()
    negatives = ids[:, None] != ids
    return DirectionSimilarities(
        image @ text.T, t_image @ t_text.T, negatives, torch.zeros(N, N) if relevance is None else relevance
    )


def arm(**values: object) -> Arm:
    return Arm.model_validate({"family": "other", "teacher": None, **values})


def weights_of(one: Arm, seen: DirectionSimilarities, regulation: Regulation | None = None) -> torch.Tensor:
    regulation = Regulation(0.6, 4.0, 7.0) if regulation is None else regulation
    return log_weights(one, regulation, seen, SCALE, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("one", "regulation"),
    [
        ({"weights": "sacl", "mass": 0.4}, Regulation(0.6, 4.0, 7.0, 0.4)),
        ({"weights": "sacl"}, Regulation(1e-9, 0.0, 30.0)),
        ({"weights": "sacl", "drop_below": 0.5}, Regulation(0.6, 4.0, 7.0, 1.0, 0.5)),
        ({"weights": "even", "mass": 3}, Regulation(0.0, 0.0, 0.0, 3.0)),
    ],
)
def test_arms_that_the_package_has_are_the_package_s(one: dict[str, object], regulation: Regulation) -> None:
    image, text, t_image, t_text, ids = sides()
    expected = similarity_regulated_loss(
        image, text, torch.tensor(SCALE, dtype=torch.float64), teacher_image=t_image, teacher_text=t_text,
        alpha=regulation.alpha, sharpness=regulation.sharpness, teacher_sharpness=regulation.teacher_sharpness,
        negative_mass=regulation.negative_mass, drop_below=regulation.drop_below, pair_ids=ids, backend="reference",
    )  # fmt: skip
    seen = direction()
    for side, losses in ((seen, expected.image_to_text), (seen.turned(), expected.text_to_image)):
        weights = weights_of(arm(**one), side, regulation)
        made = contrastive(arm(**one), side.cosine, torch.tensor(SCALE), weights, side.negatives)
        torch.testing.assert_close(made, losses, rtol=1e-6, atol=1e-9)


def test_controls_keep_what_they_are_named_after() -> None:
    seen = direction()
    z, even = SCALE * seen.cosine, torch.zeros(N, N, dtype=torch.float64).masked_fill(~seen.negatives, -torch.inf)
    regulated = weights_of(arm(weights="sacl"), seen)
    mass, shape = (weights_of(arm(weights=kind), seen) for kind in ("mass_only", "shape_only"))

    def push(w: torch.Tensor) -> torch.Tensor:
        return (z + w).logsumexp(1)

    def drawn(w: torch.Tensor) -> torch.Tensor:
        return (z + w).softmax(1)

    torch.testing.assert_close(push(mass), push(regulated))
    torch.testing.assert_close(drawn(mass), drawn(even))
    torch.testing.assert_close(push(shape), push(even))
    torch.testing.assert_close(drawn(shape), drawn(regulated))
    assert (push(regulated) - push(even)).abs().min() > 0.1
    assert (drawn(regulated) - drawn(even)).abs().max() > 0.1


def test_shuffled_weights_are_the_same_weights_elsewhere() -> None:
    seen = direction()
    regulated, shuffled = (weights_of(arm(weights=kind), seen) for kind in ("sacl", "shuffled"))
    assert ((shuffled > -torch.inf) == seen.negatives).all()
    torch.testing.assert_close(shuffled.sort(1).values, regulated.sort(1).values)
    moved = (shuffled - regulated).masked_fill(~seen.negatives, 0).abs() > 1e-9
    assert moved.sum() > 0.7 * seen.negatives.sum()


def test_removed_by_share_and_by_truth() -> None:
    relevance = (torch.rand(N, N, generator=torch.Generator().manual_seed(0)) * 1.3).clamp(max=1)
    seen = direction(relevance)
    removed = weights_of(arm(weights="removed_share", share=0.25), seen)
    light = weights_of(arm(weights="sacl"), seen)
    for row in range(N):
        gone = seen.negatives[row] & (removed[row] == -torch.inf)
        assert gone.sum() == 3  # a quarter of 12 or 11 negatives, those of least weight
        assert light[row][gone].max() < light[row][seen.negatives[row] & ~gone].min()
    matches = weights_of(arm(weights="matches"), seen)
    assert ((matches == 0) == (seen.negatives & (relevance < 1))).all()
    full = weights_of(arm(weights="relevance"), seen).exp()
    torch.testing.assert_close(full[seen.negatives].float(), (1 - relevance)[seen.negatives])


@pytest.mark.parametrize(("beta", "positives"), [(0.0, 0.0), (0.0, 0.04), (0.7, 0.04), (1.0, 0.0)])
def test_hard_and_debiased_negatives_as_their_papers_write_them(beta: float, positives: float) -> None:
    seen = direction()
    one = arm(weights="hard", beta=beta, positives=positives)
    made = contrastive(one, seen.cosine, torch.tensor(SCALE), weights_of(one, seen), seen.negatives)
    for row in range(N):
        e = np.exp(SCALE * seen.cosine[row].numpy())
        others, own = e[seen.negatives[row].numpy()], e[row]
        n = len(others)
        importance = others**beta
        reweighted = (importance * others).sum() / importance.mean()
        negative = max((reweighted - n * positives * own) / (1 - positives), n * np.exp(-SCALE))
        assert made[row] == pytest.approx(-np.log(own / (own + negative)), rel=1e-4)


def test_the_gradient_goes_through_the_similarity_alone() -> None:
    image, text, *_ = sides()
    image = image.clone().requires_grad_()
    cosine = image @ text.T
    seen = direction()
    weights = weights_of(arm(weights="sacl"), seen)
    contrastive(arm(weights="sacl"), cosine, torch.tensor(SCALE), weights, seen.negatives).sum().backward()
    w = weights.exp().numpy()
    e = w * np.exp(SCALE * seen.cosine.numpy())
    np.fill_diagonal(e, np.exp(SCALE * np.diag(seen.cosine.numpy())))
    p = e / e.sum(1, keepdims=True) - np.eye(N)
    np.testing.assert_allclose(image.grad.numpy(), SCALE * p @ text.numpy(), rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 10**6))
def test_ndcg_equals_a_plain_reading(m: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, gains = rng.permutation(m)[None].astype(float), rng.integers(0, 4, (1, m)) / 3
    ranked = [gain for _, gain in sorted(zip(scores[0], gains[0], strict=True), reverse=True)]
    discounts = [1 / np.log2(place + 2) for place in range(m)]
    best = sum(g * d for g, d in itertools.islice(zip(sorted(ranked, reverse=True), discounts, strict=True), k))
    reached = sum(g * d for g, d in itertools.islice(zip(ranked, discounts, strict=True), k))
    if best == 0:
        assert np.isnan(ndcg(scores, gains, k))
    else:
        assert ndcg(scores, gains, k) == pytest.approx(reached / best)


def test_ties_do_not_help_ndcg() -> None:
    assert ndcg(np.zeros((1, 4)), np.array([[1.0, 0, 0, 0]]), 4) == pytest.approx(1 / np.log2(5))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2, 0.4]), st.sampled_from([0.3, 0.7]))
def test_calibrated_sharpness_gives_that_share(seed: int, share: float, under: float) -> None:
    cosines = np.tanh(np.random.default_rng(seed).normal(0.2, 0.3, (60, 60)))
    negatives = ~np.eye(60, dtype=bool)
    found = sharpness_for(cosines, negatives, share, under)

    def of(kappa: float) -> float:
        under_it = []
        for c in (cosines, cosines.T):
            s = np.exp(kappa * c[negatives].reshape(60, 59))
            under_it.append(59 * (1 / s) / (1 / s).sum(1, keepdims=True) < under)
        return float(np.mean(under_it))

    assert of(found) == pytest.approx(share, abs=0.01)
    assert of(0.8 * found) < share


def test_weights_fall_where_they_are_asked_to() -> None:
    cosines = np.random.default_rng(0).uniform(-0.5, 0.9, 20_000)
    start, alpha = falling_weights(cosines, 0.05, 60.0)
    assert (cosines > start).mean() == pytest.approx(0.05, abs=1e-3)
    s = Regulation(alpha, 0.0, 60.0).log_similarity(torch.zeros(3), torch.tensor([start - 0.2, start, start + 0.1]))
    assert s[0].abs() < 1e-4
    assert float(s[1]) == pytest.approx(np.log(2), abs=1e-3)
    assert float(s[2]) == pytest.approx(6, abs=0.01)
    assert falling_weights(np.array([-1.0]), 0.5, 80.0)[1] == pytest.approx(1)


def plan(**changes: object) -> Plan:
    return Plan.model_validate({**TINY, **changes})


def test_a_trial_is_known_by_what_it_trains() -> None:
    one = plan()
    assert one.fingerprint("plain", 0) == one.fingerprint("same as plain", 0)
    renamed = {("taught" if name == "student" else name): value for name, value in TINY["arms"].items()}
    assert plan(arms=renamed).fingerprint("taught", 1) == one.fingerprint("student", 1)
    better = {**TINY["arms"], "clean": {**TINY["arms"]["clean"], "steps": 5}}
    assert plan(arms=better).fingerprint("student", 1) != one.fingerprint("student", 1)
    assert plan(arms=better).fingerprint("plain", 1) == one.fingerprint("plain", 1)
    order = one.ordered()
    assert order.index("clean") < order.index("student")
    assert sorted(order) == sorted(one.arms)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"a": {"family": "infonce", "teacher": "b"}}}, "arm a: no arm is called 'b'"),
        (
            {"arms": {"a": {"family": "other", "teacher": "b"}, "b": {"family": "other", "teacher": "a"}}},
            "arm a: its teachers b, a go round in a circle",
        ),
        ({"arms": {"a": {"family": "best"}}}, "arms.a.family: Input should be"),
        ({"arms": {"a": {"family": "other", "fall": 0.1}}}, "fall needs a teacher arm and sharpness 0"),
        ({"arms": {}, "sweeps": {"x": {"a": 1}}}, "sweep 'x': no arm is called 'a'"),
        ({"common": {"stepps": 4}}, "common.stepps: Extra inputs are not permitted"),
        ({"common": {"steps": True}}, "common.steps: Input should be a number"),
        ({"seeds": [0, True]}, "seeds: Input should be a number"),
        ({"arms": {"a": {"family": "other", "mass": True}}}, "arms.a.mass: Input should be a number"),
        ({"sweeps": {"x": {"a": float("nan")}}}, "sweeps.x.a: Input should be a finite number"),
    ],
)
def test_a_wrong_plan_is_one_line(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**TINY, "sweeps": {}, **changes}))
    with pytest.raises(UserError) as raised:
        read_plan(tmp_path / "plan.yaml")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_plans_that_come_with_the_package(root: Path) -> None:
    for path in sorted((root / "launch/configs").glob("study*.yaml")):
        found = read_plan(path)
        families = {arm.family for arm in found.arms.values()}
        assert {"infonce", "control", "regulated", "oracle"} <= families, path
    assert len(found.arms) > 5


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study, run by its command."""
    out = tmp_path_factory.mktemp("study")
    (out / "plan.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    return out


def command(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return program("tools/study.py", "--plan", out / "plan.yaml", "--out", out, *more, check=False)


@pytest.mark.slow
def test_a_study_runs_once_and_is_kept(study: Path) -> None:
    done = command(study, "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", seed ") == 14  # eight arms, of which two are the same, of two seeds
    found = finished(plan(), Folder(study))
    assert len(found) == 16
    assert found["plain", 0]["mAP"] == found["same as plain", 0]["mAP"] != found["plain", 1]["mAP"]
    assert 0 < found["student", 0]["found"]["alpha"] < 1
    assert found["constant", 1]["logit_scale"] == pytest.approx(30)
    kept = (study / "trials.jsonl").read_text()
    again = command(study)
    assert again.returncode == 0
    assert ", seed " not in again.stdout.split("| arm")[0]
    assert (study / "trials.jsonl").read_text() == kept
    with (study / "trials.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 16
    assert "against the best arm without similarity" in (study / "table.md").read_text()
    assert all((study / name).stat().st_size > 5000 for name in ("arms.png", "sweeps.png"))


@pytest.mark.slow
def test_a_lost_trial_is_made_again_the_same(study: Path) -> None:
    """As a study that was stopped while it wrote goes on, here without the teacher's weights: it is trained anew, and
    nobody else. A trial depends on its plan and seed alone."""
    one, folder = plan(), Folder(study)
    before = finished(one, folder)
    lines = folder.trials.read_text().splitlines(keepends=True)
    lost = next(line for line in lines if one.fingerprint("student", 1) in line)
    folder.trials.write_text("".join(line for line in lines if line != lost) + lost[:50])
    for name in ("student", "clean", "plain"):
        folder.weights(one.fingerprint(name, 1)).unlink()
    ran = []
    prepared()
    run_plan(one, folder, 1, "cpu", lambda trial, _: ran.append(trial))
    assert ran == [("clean", 1), ("student", 1)]
    for trial, result in finished(one, folder).items():
        assert result["mAP"] == before[trial]["mAP"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--arms", "palin"], "no arm of the plan is called 'palin'; it has student, calibrated, plain"),
        (["--seeds", "7"], "seed 7 is none of the plan's: 0, 1"),
        (["--processes", "0"], "--processes 0: at least 1"),
        (["--plan", "nowhere.yaml"], "nowhere.yaml cannot be read: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(line: list[str], said: str, study: Path) -> None:
    done = command(study, *line)
    assert done.returncode != 0
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def row(name: str, family: str, *values: float) -> ArmSummary:
    return ArmSummary(name, family, {"mAP": list(values)}, 1.0)


def test_the_verdict_counts_spreads_and_the_way_to_the_oracle() -> None:
    plain, free = row("plain", "infonce", 0.60, 0.62, 0.61), row("constant", "control", 0.63, 0.65, 0.64)
    ours, best = row("sacl", "regulated", 0.68, 0.70, 0.69), row("oracle", "oracle", 0.71, 0.70, 0.72)
    first, second = verdict(sorted([plain, free, ours, best], key=lambda each: -each.mean))
    assert "+5.0 points of mAP (+5.0, +5.0, +5.0 seed by seed), 5.0 spreads" in first
    assert first.endswith("more than two. The differences themselves vary by 0.0.")
    assert "NOT" not in first
    assert "goes 80 % of the way, constant 30 %" in second
    uneven = row("sacl", "regulated", 0.68, 0.72, 0.69)  # ahead by 5, 7 and 5: mean 5.67, spread 1.15
    assert verdict([uneven, free])[0].endswith("vary by 1.2, 4.9 spreads of their own.")
    close = row("sacl", "regulated", 0.64, 0.66, 0.65)
    assert "NOT more than two." in verdict([close, free])[0]
    assert "one seed says nothing" in verdict([row("a", "regulated", 0.5), row("b", "infonce", 0.4)])[0]


@pytest.mark.slow
def test_arms_without_all_seeds_are_left_out(study: Path) -> None:
    everything = finished(plan(), Folder(study))
    some = {trial: result for trial, result in everything.items() if trial != ("oracle", 1)}
    assert {each.name for each in rows(plan(), everything)} - {each.name for each in rows(plan(), some)} == {"oracle"}
