"""ITM's hard negatives are drawn with exactly the probabilities asked for."""

import pytest
import torch

from sacl_ds.losses import Regulation, Weighting, hard_negatives, similarity_regulated_loss

B, DRAWS = 7, 1500
IDS = torch.tensor([[0, 10], [1, 11], [0, 12], [3, 13], [4, 11], [5, 15], [6, 16]])


def unit(seed: int, width: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(B, width, generator=generator), dim=1)


def probabilities(exponent: torch.Tensor) -> torch.Tensor:
    same = (IDS[:, None] == IDS[None]).any(-1)
    return exponent.double().masked_fill(same, -torch.inf).softmax(1)


@pytest.mark.parametrize(
    ("weights", "tile"), [("none", 3), ("regulated", 3), ("none", 100), ("regulated", 100), ("dropped", 100)]
)
def test_shares_are_those_asked_for(weights: str, tile: int) -> None:
    """Chi-square under its 99.999 % point for every row."""
    image, text, teacher = unit(0), unit(1), (unit(2), unit(3))
    settings = {"alpha": 0.4, "sharpness": 2.0, "teacher_sharpness": 3.0}
    weighting = Weighting(Regulation(**settings), teacher) if weights == "regulated" else None
    if weights == "dropped":
        settings["drop_below"] = 0.3
        out = similarity_regulated_loss(image, text, torch.tensor(4.0), *teacher, pair_ids=IDS, **settings)
        weighting = Weighting(Regulation(**settings), teacher, out.least_kept)
    generator = torch.Generator().manual_seed(4)
    drawn = torch.zeros(2, B, B)
    for _ in range(DRAWS):
        negatives = hard_negatives(image, text, torch.tensor(4.0), IDS, 0.5, weighting, generator, tile)
        assert negatives.text_found.all()
        assert negatives.image_found.all()
        drawn[0, range(B), negatives.text] += 1
        drawn[1, range(B), negatives.image] += 1
    exponents = [0.5 * 4.0 * image @ text.T, 0.5 * 4.0 * text @ image.T]
    inverse = 1 / (0.4 * (3 * teacher[0] @ teacher[1].T).exp() + 0.6 * (2 * image @ text.T).exp())
    if weights == "regulated":
        exponents = [exponents[0] + inverse.log(), exponents[1] + inverse.T.log()]
    if weights == "dropped":
        same = (IDS[:, None] == IDS[None]).any(-1)
        for exponent, of_anchors in zip(exponents, (inverse, inverse.T), strict=True):
            others = of_anchors.masked_fill(same, 0.0)
            removed = others / (others.sum(1) / (~same).sum(1))[:, None] < 0.3
            assert 2 <= (removed & ~same).sum() <= 15
            exponent.masked_fill_(removed, -torch.inf)
    for counts, expected in zip(drawn, map(probabilities, exponents), strict=True):
        assert (counts[expected == 0] == 0).all()
        wanted = expected * DRAWS
        statistic = torch.where(expected > 0, (counts - wanted) ** 2 / wanted, 0).sum(1)
        assert (statistic < 30.9).all(), statistic  # five degrees of freedom at most


def test_hardness_without_limit_takes_the_most_similar() -> None:
    image, text = unit(0), unit(1)
    negatives = hard_negatives(image, text, torch.tensor(50.0), hardness=1000.0)
    cosine = (image @ text.T).fill_diagonal_(-2)
    assert (negatives.text == cosine.argmax(1)).all()
    assert (negatives.image == cosine.argmax(0)).all()


@pytest.mark.parametrize("hardness", [float("nan"), float("inf"), -float("inf")])
def test_a_hardness_that_is_no_number_is_refused(hardness: float) -> None:
    with pytest.raises(ValueError, match=rf"^hardness={hardness} must be finite$"):
        hard_negatives(unit(0), unit(1), torch.tensor(10.0), hardness=hardness)


def test_a_single_pair_and_pairs_that_are_all_the_same() -> None:
    one = hard_negatives(unit(0)[:1], unit(1)[:1], torch.tensor(10.0))
    assert not one.text_found.any()
    assert not one.image_found.any()
    same = hard_negatives(unit(0), unit(1), torch.tensor(10.0), torch.zeros(B, dtype=torch.int64))
    assert not same.text_found.any()
    assert same.text.shape == same.image.shape == (B,)
