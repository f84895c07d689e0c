"""Retrieval from the model to the metrics: first stage by features, second by ITM, on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sacl_ds.data.batch import View
from sacl_ds.evaluation.coco import DEPTH, coco_figures, coco_truth
from sacl_ds.evaluation.encoding import Encoded, check, encode
from sacl_ds.evaluation.first_stage import Ranked, rank_candidates
from sacl_ds.evaluation.ranking import LISTED, Figures, Ranking, Truth, figures_of, ranking_of
from sacl_ds.evaluation.rerank import candidate_scores, match_scores, reordered, with_similarity
from sacl_ds.evaluation.rounds import Done, RetrievalSet, unseen
from sacl_ds.model.sacl import SaclModel


@dataclass(frozen=True)
class RetrievalResult:
    """Result of a retrieval. figures: {name: (value, chance)}, fractions. notes: lines on what was left out, or could
    not be computed."""

    figures: Figures
    ranking: Ranking
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def evaluate_retrieval(
    model: SaclModel,
    data: RetrievalSet,
    view: View,
    device: torch.device,
    batch_size: int,
    rerank: int = 0,
    done: Done = unseen,
    similarity: float = 0.0,
) -> RetrievalResult:
    """Text to image and image to text in eval mode; the model's mode is restored. Every rank calls it, and gets the
    same.

    rerank: how many candidates of each query ITM puts in order, 0 for none; at most batch_size images, captions or
    pairs are in a forward pass. done(stage, count, total): progress on this rank. similarity: how much of ITC's logit,
    the cosine times the logit scale, is added to ITM's log-odds; 0 as in ALBEF, 1 as in BLIP. Raises SharedError where
    more images than data.max_bad_share cannot be read.

    Figures are text_to_image_R@k and image_to_text_R@k of own pairs (k of 1, 5, 10) and their mean, mean_recall; where
    all pairs are known text_to_image_any_R@1, text_to_image_mAP and image_to_text_any_R@1; on COCO's whole test split
    those of `coco_figures`; and all of them again with the prefix reranked_.
    """
    was_training = model.training
    model.eval()
    try:
        encoded = encode(model, data, view, device, batch_size, rerank > 0, done)
        notes = [line] if (line := check(encoded.faults, data)) else []
        n, m = len(encoded.keys), len(encoded.captions)
        truth = Truth(encoded.owner, n, _satisfying(data, encoded))
        coco, note = coco_truth(data.coco, encoded)
        notes += [note] if note else []
        depth = max(rerank, LISTED, DEPTH if coco else 0)
        to_image = rank_candidates(
            encoded.text, encoded.image, truth.of_texts(), min(depth, n), done, "ranking images for captions"
        )
        to_text = rank_candidates(
            encoded.image, encoded.text, truth.of_images(), min(depth, m), done, "ranking captions for images"
        )
        features = encoded.text, encoded.image
        figures = figures_of(truth, to_image, to_text, features)
        second: tuple[Ranked, Ranked] | None = None
        if rerank > 0:
            images_of, texts_of = to_image.top[:, :rerank], to_text.top[:, :rerank]
            pairs = match_scores(model, data, view, device, encoded, (images_of, texts_of), batch_size, done)
            if similarity:
                pairs = with_similarity(pairs, encoded, similarity * float(model.logit_scale().detach()))
            scores = list(candidate_scores(pairs, images_of, texts_of))
            second = reordered(to_image, scores[0]), reordered(to_text, scores[1])
            figures |= figures_of(truth, *second, features, (images_of, scores[0]), "reranked_")
        if coco:
            figures |= coco_figures(coco, encoded, (to_image, to_text), second, rerank)
    finally:
        model.train(was_training)
    return RetrievalResult(figures, ranking_of(encoded, (to_image, to_text), second, truth.right), notes)


def _satisfying(data: RetrievalSet, encoded: Encoded) -> np.ndarray | None:
    known = data.satisfying
    if known is None:
        return None
    if known.shape != (len(encoded.captions), len(encoded.keys)) or known.dtype != np.bool_:
        raise ValueError(
            f"satisfying is {known.dtype} {known.shape}: need bool of the {len(encoded.captions)} captions and "
            f"{len(encoded.keys)} images that could be read"
        )
    return known
