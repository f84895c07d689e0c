"""RandAugment for fine-tuning: what each operation does, what is drawn, and when a picture is mirrored."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sacl_ds.data.pictures import Picture
from sacl_ds.data.transforms import TrainView
from sacl_ds.tasks.task import OPERATIONS, FinetuneView, drawn_operations

GREY = 128


def noise(seed: int = 0, rows: int = 60, columns: int = 90) -> torch.Tensor:
    return torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def square(side: int = 384) -> torch.Tensor:
    """A white square of 40 pixels in the middle of black."""
    pixels = torch.zeros(3, side, side, dtype=torch.uint8)
    pixels[:, side // 2 - 20 : side // 2 + 20, side // 2 - 20 : side // 2 + 20] = 255
    return pixels


def centre(pixels: torch.Tensor) -> tuple[float, float]:
    """(across, down) of what is white, in pixels from the top left corner."""
    down, across = torch.nonzero(pixels[0] > 200, as_tuple=True)
    return float(across.double().mean()) + 0.5, float(down.double().mean()) + 0.5


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("step", [-10, -7, 0, 7, 10])
def test_shape_and_type_stay(name: str, step: int) -> None:
    for pixels in (noise(), torch.full((3, 5, 5), 9, dtype=torch.uint8)):
        changed = OPERATIONS[name](pixels, step)
        assert changed.dtype == torch.uint8
        assert changed.shape == pixels.shape


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize"}))
def test_magnitude_0_changes_nothing(name: str) -> None:
    pixels = noise()
    assert (OPERATIONS[name](pixels, 0).int() - pixels.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("translate_x", 7, (199, 192)),  # a pixel a step where the picture is 384 wide
        ("translate_x", -7, (185, 192)),
        ("translate_y", 10, (192, 202)),
        ("translate_y", -3, (192, 189)),
        ("shear_x", 10, (192 + 0.3 * 192, 192)),  # about the top left corner
        ("shear_x", -5, (192 - 0.15 * 192, 192)),
        ("shear_y", 10, (192, 192 + 0.3 * 192)),
        ("shear_y", -5, (192, 192 - 0.15 * 192)),
    ],
)
def test_where_the_middle_comes_to(name: str, step: int, expected: tuple[float, float]) -> None:
    assert centre(OPERATIONS[name](square(), step)) == pytest.approx(expected, abs=0.6)


def test_a_smaller_picture_moves_by_the_same_share() -> None:
    assert centre(OPERATIONS["translate_x"](square(192), 10)) == pytest.approx((101, 96))


def test_what_comes_from_outside_is_grey() -> None:
    white = torch.full((3, 384, 384), 255, dtype=torch.uint8)
    moved = OPERATIONS["translate_x"](white, 7)
    assert (moved[:, :, :7] == GREY).all()
    assert (moved[:, :, 7:] == 255).all()
    for name in ("shear_x", "shear_y", "rotate"):
        changed = OPERATIONS[name](white, 7)[0]
        outside = (changed == GREY).float().mean()
        assert 0.04 < outside < 0.3, name
        assert (changed == 255).float().mean() + outside > 0.98, "all but a seam of mixed pixels"


def test_turned_counter_clockwise_by_3_degrees_a_step() -> None:
    """A bar from the middle to the right points upwards behind it."""
    pixels = torch.zeros(3, 201, 201, dtype=torch.uint8)
    pixels[:, 99:102, 100:190] = 255
    across, down = centre(OPERATIONS["rotate"](pixels, 7))
    angle = torch.atan2(torch.tensor(100.5 - down), torch.tensor(across - 100.5)).rad2deg()
    assert angle == pytest.approx(21, abs=0.5)
    assert centre(OPERATIONS["rotate"](pixels, -7))[1] == pytest.approx(201 - down, abs=0.2)


def test_brightness_and_sharpness() -> None:
    pixels = noise() // 2
    brighter, darker = (OPERATIONS["brightness"](pixels, step).double() for step in (7, -7))
    assert (brighter - (1.35 * pixels.double())).abs().max() <= 1
    assert (darker - (0.65 * pixels.double())).abs().max() <= 1
    edge = torch.zeros(3, 20, 20, dtype=torch.uint8) + 100
    edge[:, :, 10:] = 150
    sharp, soft = (OPERATIONS["sharpness"](edge, step)[0, 10] for step in (10, -10))
    assert sharp[9] < 100 < soft[9] < soft[10] < 150 < sharp[10]


@pytest.mark.parametrize(("name", "pillow"), [("autocontrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize)])
def test_as_pillow_has_it(name: str, pillow) -> None:
    pixels = 60 + noise(3) // 3
    expected = pillow(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    expected = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(60, 90, 3).permute(2, 0, 1)
    assert (OPERATIONS[name](pixels, 7).int() - expected.int()).abs().max() <= 1
    assert (expected.int() - pixels.int()).abs().max() > 20


def test_distribution_of_what_is_drawn() -> None:
    """Ten operations alike, each carried out half of the time, both signs alike: each count within 5 deviations."""
    draws = 20_000
    drawn = [drawn_operations(2, 7, (5, number)) for number in range(draws)]
    sizes = Counter(map(len, drawn))
    for size, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert abs(sizes[size] - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5
    each = Counter(pair for some in drawn for pair in some)
    assert set(each) == {(name, step) for name in OPERATIONS for step in (7, -7)}
    share = 1 / 40  # of the 2 * draws places: half are carried out, of those a tenth is this one, half with this sign
    for count in each.values():
        assert abs(count - share * 2 * draws) < 5 * (2 * draws * share) ** 0.5
    both = Counter((some[0][0], some[1][0]) for some in drawn if len(some) == 2)
    assert len(both) == 100, "the two are drawn apart, with repeats"


def test_a_view_is_the_crop_and_what_is_drawn() -> None:
    picture = Picture(noise())
    for number in range(30):
        entropy = (1, number)
        expected = TrainView(32, (0.5, 1.0), True)(picture, entropy)
        for name, step in drawn_operations(3, 4, entropy):
            expected = OPERATIONS[name](expected, step)
        assert torch.equal(FinetuneView(32, (0.5, 1.0), True, 3, 4)(picture, entropy), expected)


def test_the_same_entropy_gives_the_same_pixels() -> None:
    view = FinetuneView(48, (0.5, 1.0), True)
    pixels = [view(Picture(noise()), (7, number % 20)) for number in range(40)]
    assert all(torch.equal(pixels[number], pixels[number + 20]) for number in range(20))
    assert len({row.numpy().tobytes() for row in pixels}) == 20
    assert {(*row.shape, row.dtype) for row in pixels} == {(3, 48, 48, torch.uint8)}


def test_without_operations_it_is_the_training_view() -> None:
    plain, picture = TrainView(32, (0.3, 0.9), False), Picture(noise())
    for view in (FinetuneView(32, (0.3, 0.9), False, operations=0), FinetuneView(32, (0.3, 0.9), False)):
        same = [torch.equal(view(picture, (number,)), plain(picture, (number,))) for number in range(40)]
        assert all(same) == (view.operations == 0)


@pytest.mark.parametrize("wrong", [{"operations": -1}, {"magnitude": 11}, {"magnitude": -1}])
def test_bounds(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="magnitude"):
        FinetuneView(32, (0.5, 1.0), False, **wrong)


SIDED = ("left", "right", "Left", "RIGHT", "leftmost", "rightmost", "left-hand", "lefts", "rightwards", "left_side")
FREE = ("bright", "upright", "cleft", "copyright", "lef", "righ", "a", "dog", "élleft", "fright", "aloft", "wright")
JOINTS = (" ", ", ", "-", " (", "\n", ' "', "/", ". ")


@given(
    st.lists(st.tuples(st.sampled_from(SIDED + FREE), st.sampled_from(JOINTS)), max_size=6),
)
def test_no_mirroring_where_the_text_says_left_or_right(words: list[tuple[str, str]]) -> None:
    text = "".join(joint + word for word, joint in words)
    view = FinetuneView(32, (1.0, 1.0), True, operations=0)
    assert view.for_text(text).flip == (not any(word in SIDED for word, _ in words))
    still = FinetuneView(32, (1.0, 1.0), False)
    assert still.for_text(text) == still


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=20), st.integers(0, 2**64 - 1))
def test_the_rest_of_the_view_stays(text: str, word: int) -> None:
    """With a text, the same crop and operations, at most not mirrored."""
    picture = Picture(noise(rows=32, columns=32))
    view = FinetuneView(32, (1.0, 1.0), True, operations=0)
    whole = TrainView(32, (1.0, 1.0), False)(picture, (word,))
    seen = view.for_text(f"{text} on the right")(picture, (word,))
    assert torch.equal(seen, whole)
    assert any(torch.equal(view.for_text("a dog")(picture, (word,)), way) for way in (whole, whole.flip(2)))


def test_half_are_mirrored() -> None:
    picture = Picture(noise(rows=32, columns=32))
    view = FinetuneView(32, (1.0, 1.0), True, operations=0)
    whole = TrainView(32, (1.0, 1.0), False)
    mirrored = sum(torch.equal(view(picture, (n,)), whole(picture, (n,)).flip(2)) for n in range(400))
    assert 150 < mirrored < 250
