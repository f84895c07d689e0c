"""With drop_below, hard negatives are drawn from what the contrastive loss has kept, and from nothing else."""

import numpy as np
import pytest
import torch
from dropped import kept_negatives, same_pairs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sacl_ds.losses import Keys, Regulation, Weighting, hard_negatives, similarity_regulated_loss

SCALE = torch.tensor(10.0)

regulations = st.builds(
    Regulation,
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    sharpness=st.sampled_from([0.0, 1.0, 4.0, 9.0]),
    teacher_sharpness=st.sampled_from([0.0, 3.0, 7.0]),
    negative_mass=st.sampled_from([1.0, 0.1]),
    drop_below=st.floats(0.05, 2.5),
)


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


@settings(max_examples=300, deadline=None)
@given(
    regulation=regulations,
    n=st.integers(1, 14),
    id_columns=st.integers(0, 2),
    hardness=st.sampled_from([0.0, 0.25, 1.0, 4.0]),
    rows=st.integers(1, 14),
    keys=st.sampled_from(["none", "momentum", "queue", "queue apart"]),
    backend=st.sampled_from(["streaming", "reference"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_that_is_removed_is_drawn(
    regulation: Regulation, n: int, id_columns: int, hardness: float, rows: int, keys: str, backend: str, seed: int
) -> None:
    """Bounds of the global batch, draws within micro-batches of `rows` pairs, against numpy over the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    image, text, *momentum = unit(generator, 4, n, 5)
    teacher, old, old_teacher = unit(generator, 2, n, 4), unit(generator, 2, 9, 5), unit(generator, 2, 9, 4)
    queue = 9 if keys.startswith("queue") else 0
    ids = torch.randint(0, 2 * n, (n + queue, id_columns), generator=generator) if id_columns else None
    mine, compared = None if ids is None else ids[:n], None
    if keys != "none":
        queued = [*old, *old_teacher, None if ids is None else ids[n:]] if queue else [None] * 5
        compared = Keys(*momentum, *queued, regulate_queue=keys == "queue")
    out = similarity_regulated_loss(
        image, text, SCALE, *teacher, regulation.alpha, regulation.sharpness, regulation.teacher_sharpness, mine,
        regulation.negative_mass, regulation.drop_below, backend=backend, keys=compared,
    )  # fmt: skip
    weighting = Weighting(
        regulation, tuple(teacher), out.least_kept, None if compared is None else (compared.image, compared.text)
    )

    sides, keys_of, found = (image, text), (image, text) if compared is None else momentum, []
    queue = queue if keys == "queue" else 0  # what the bounds depend on
    same = same_pairs(None if ids is None else ids[: n + queue], n, queue)
    for anchor, key in ((0, 1), (1, 0)):
        columns = torch.cat([keys_of[key], old[key][:queue]]), torch.cat([teacher[key], old_teacher[key][:queue]])
        found.append(kept_negatives(sides[anchor], columns[0], (teacher[anchor], columns[1]), same, regulation))
    assume(all(each.margin > 1e-4 for each in found))  # float32 may round a weight across its bound
    for bounds, each in zip(out.least_kept, found, strict=True):
        has = ~same.all(1)
        np.testing.assert_allclose(bounds.numpy()[has], each.least[has], rtol=1e-5, atol=1e-5)

    for start in range(0, n, rows):
        part = slice(start, start + rows)
        drawn = hard_negatives(
            image[part], text[part], SCALE, None if mine is None else mine[part], hardness, weighting.part(part),
            generator, tile=5,
        )  # fmt: skip
        for each, index, exists in zip(
            found, (drawn.text, drawn.image), (drawn.text_found, drawn.image_found), strict=True
        ):
            kept = each.kept[part, part]
            assert (exists.numpy() == kept.any(1)).all()
            assert kept[np.arange(len(kept)), index.numpy()][exists.numpy()].all()


@pytest.mark.parametrize("tile", [3, 100])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("regulated", [False, True])
def test_without_drop_below_draws_are_those_of_the_formula_to_the_bit(regulated: bool, ids: bool, tile: int) -> None:
    """Gumbel-max as written, image anchors' numbers first, tile by tile."""
    n, hardness = 8, 0.7
    image, text, *teacher = unit(torch.Generator().manual_seed(0), 4, n, 5)
    regulation = Regulation(0.4, 3.0, 5.0)
    numbers = torch.tensor([0, 1, 2, 0, 4, 1, 6, 7]) if ids else torch.arange(n)
    exponent = hardness * SCALE * (image @ text.T)
    if regulated:
        exponent = exponent - regulation.log_similarity(image @ text.T, teacher[0] @ teacher[1].T)
    exponent = exponent.double().masked_fill(numbers[:, None] == numbers, -torch.inf)
    generator, noise = torch.Generator().manual_seed(1), torch.empty(2, n, n, dtype=torch.float64)
    for i in range(0, n, tile):
        for j in range(0, n, tile):
            for direction in range(2):
                part = noise[direction, i : i + tile, j : j + tile]
                part.copy_(torch.empty(part.shape, dtype=torch.float64).exponential_(generator=generator).log_())
    weighting = Weighting(regulation, tuple(teacher)) if regulated else None
    generator = torch.Generator().manual_seed(1)
    drawn = hard_negatives(image, text, SCALE, numbers if ids else None, hardness, weighting, generator, tile)
    assert torch.equal(drawn.text, (exponent - noise[0]).argmax(1))
    assert torch.equal(drawn.image, (exponent - noise[1]).argmax(0))


def test_what_a_weighting_needs() -> None:
    features = unit(torch.Generator().manual_seed(0), 2, 3, 4)
    with pytest.raises(ValueError, match=r"alpha=0\.5 needs the teacher's features"):
        Weighting(Regulation(alpha=0.5))
    with pytest.raises(ValueError, match=r"drop_below=0\.5 needs the loss's least_kept"):
        Weighting(Regulation(drop_below=0.5), tuple(features))
