"""Features of pairs around topics, for analyses."""

import numpy as np

from sacl_ds.analysis.subject import Pairs


def made_pairs(count: int = 50, topics: int = 8, seed: int = 0, scale: float = 20.0) -> Pairs:
    """Features around topics, with a repeated image and a repeated caption."""
    g = np.random.default_rng(seed)
    topic = g.integers(0, topics, count)

    def unit(width: int, noise: float, centres: np.ndarray) -> np.ndarray:
        x = centres[topic] + noise * g.standard_normal((count, width))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    own, theirs = g.standard_normal((topics, 12)), g.standard_normal((topics, 7))
    captions = [f"caption {n}" for n in range(count)]
    captions[9] = "Caption, 4"
    hashes = [f"{n:064x}" for n in range(count)]
    hashes[7] = hashes[2]
    ids = np.stack([np.arange(count), 1000 + np.arange(count)], 1)
    ids[7, 0], ids[9, 1] = ids[2, 0], ids[4, 1]
    return Pairs(
        [f"{n:06d}" for n in range(count)], [f"/data/{n // 20:05d}.tar" for n in range(count)], captions,
        unit(12, 0.8, own), unit(12, 0.8, own), unit(7, 0.5, theirs), unit(7, 0.5, theirs), ids, scale,
        hashes, [f"http://x/{n}.jpg" for n in range(count)],
    )  # fmt: skip


def columns(pairs: Pairs) -> dict[str, np.ndarray]:
    """As `dense` takes them."""
    assert pairs.teacher is not None
    teacher_image, teacher_text = pairs.teacher
    return {
        "image": pairs.image, "text": pairs.text, "teacher_image": teacher_image, "teacher_text": teacher_text,
        "ids": pairs.pair_ids,
    }  # fmt: skip
