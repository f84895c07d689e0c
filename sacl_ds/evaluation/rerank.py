"""Second stage of retrieval: the best candidates of the first, ordered by the fusion encoder's ITM probability."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sacl_ds.data.batch import View
from sacl_ds.distributed import raise_on_all_ranks, rank, sum_over_ranks, world_size
from sacl_ds.errors import UserError
from sacl_ds.evaluation.encoding import Encoded, stacked
from sacl_ds.evaluation.first_stage import Ranked
from sacl_ds.evaluation.metrics import best_relevant_places
from sacl_ds.evaluation.rounds import Done, ImageRounds, RetrievalSet, unseen
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.vision import ImageStates

_PAIRS_AT_ONCE = 2**16


@dataclass(frozen=True)
class PairScores:
    """ITM logits (match less no match) of some pairs of n images with m texts.

    keys: (p,) int64, ascending: image * texts + text. values: (p,) float32.
    """

    texts: int
    keys: np.ndarray
    values: np.ndarray

    def of(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Look up the pairs' scores, float32, of any shape. Every pair must be among those scored."""
        return self.values[np.searchsorted(self.keys, images * self.texts + texts)]


@torch.no_grad()
def match_scores(
    model: SaclModel,
    data: RetrievalSet,
    view: View,
    device: torch.device,
    encoded: Encoded,
    candidates: tuple[np.ndarray, np.ndarray],
    batch_size: int,
    done: Done = unseen,
) -> PairScores:
    """Score the candidates of both directions, each pair once; every rank calls it and gets all scores.

    candidates: (m, k) indices of images for each text, and (n, k') of texts for each image. A rank goes through its own
    images once more, encodes at most batch_size at a time, and scores at most batch_size of their pairs at a time; all
    ranks run equally many passes. Raises UserError where an image that was there can no longer be read.
    """
    states = encoded.states
    assert states is not None
    m = len(states.lengths)
    images_of, texts_of = candidates
    for_texts, for_images = images_of * m + np.arange(m)[:, None], np.arange(len(texts_of))[:, None] * m + texts_of
    keys = np.unique(np.concatenate([for_texts.ravel(), for_images.ravel()]))
    bounds = np.searchsorted(keys, np.arange(len(texts_of) + 1) * m)  # where the pairs of each image begin
    rounds = ImageRounds(data, view, batch_size)
    pairs = np.zeros((world_size(), len(rounds)), np.int64)
    np.add.at(pairs, (encoded.numbers % world_size(), encoded.numbers // world_size() // batch_size), np.diff(bounds))
    passes = -(-pairs.max(0) // batch_size)
    values = np.zeros(len(keys), np.float32)
    place_of = {int(number): place for place, number in enumerate(encoded.numbers)}
    scored, mine = 0, int(pairs[rank()].sum())
    for part, several in zip(rounds, passes.tolist(), strict=True):
        image_states, _ = model.encode_image(stacked(part, view, device))
        there = [(row, place_of[each.number]) for row, each in enumerate(part) if each.number in place_of]
        wanted = np.concatenate([np.empty(0, int), *(np.arange(bounds[i], bounds[i + 1]) for _, i in there)])
        row = np.repeat([row for row, _ in there], [bounds[i + 1] - bounds[i] for _, i in there]).astype(int)
        order = np.argsort(states.lengths[keys[wanted] % m], kind="stable")  # for little padding
        for start in range(0, several * batch_size, batch_size):
            some = order[start : start + batch_size]
            # where there are none left, a pass that others need
            texts, rows = (keys[wanted[some]] % m, row[some]) if len(some) else ([0], [0])
            made = _scores(model, image_states, rows, *states.batch(texts), device)
            values[wanted[some]] = made[: len(some)]
            scored += len(some)
            done("re-ranking", scored, mine)
    with raise_on_all_ranks():
        if lost := [fault for fault in rounds.faults if str(fault) not in set(map(str, encoded.faults))]:
            raise UserError(f"{lost[0]}; it could be read a while ago: do not change the images during an evaluation")
    return PairScores(m, keys, sum_over_ranks(torch.from_numpy(values).to(device)).cpu().numpy())


def _scores(
    model: SaclModel,
    images: ImageStates,
    rows: Sequence[int] | np.ndarray,
    states: Tensor,
    mask: Tensor,
    device: torch.device,
) -> np.ndarray:
    states, mask = states.to(device), mask.to(device)
    tokens = model.image_tokens(images, states[:, 0], torch.as_tensor(rows, device=device))
    logits = model.match_logits(model.fuse(states, mask, tokens))
    return (logits[:, 1] - logits[:, 0]).cpu().numpy()


def with_similarity(pairs: PairScores, encoded: Encoded, factor: float) -> PairScores:
    """Add ITM's log-odds and ITC's logits, scaled cosines. factor: of the cosines, in float32."""
    values = pairs.values.copy()
    for start in range(0, len(values), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        images, texts = np.divmod(pairs.keys[some], pairs.texts)
        values[some] += np.float32(factor) * np.einsum("pd,pd->p", encoded.image[images], encoded.text[texts])
    return PairScores(pairs.texts, pairs.keys, values)


def reordered(ranked: Ranked, scores: np.ndarray) -> Ranked:
    """Sort each query's first k candidates by their (q, k) scores; the others follow in their old order.

    Among equals the order is that of the first stage, but ties never help a place. NaN scores stand last of the k.
    """
    k = scores.shape[1]
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=1, kind="stable")

    def moved(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([np.take_along_axis(rows[:, :k], order, 1), rows[:, k:]], 1)

    # a relevant candidate that is not among the k stands where it stood: all k are ahead of it before and after
    places = {
        name: np.where(hits[:, :k].any(1), best_relevant_places(scores, hits[:, :k]), ranked.places[name])
        for name, hits in ranked.hits.items()
    }
    return Ranked(moved(ranked.top), places, {name: moved(hits) for name, hits in ranked.hits.items()})


def candidate_scores(pairs: PairScores, images_of: np.ndarray, texts_of: np.ndarray) -> Iterator[np.ndarray]:
    """Return (m, k) scores of each text's images, then (n, k') scores of each image's texts."""
    yield pairs.of(images_of, np.arange(len(images_of))[:, None])
    yield pairs.of(np.arange(len(texts_of))[:, None], texts_of)
