"""Trial of a study: an arm trained with one seed, and its metrics on held-out scenes."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sacl_ds.analysis.calibrate import sharpness_for
from sacl_ds.analysis.ranking import Detector
from sacl_ds.config import OptimConfig
from sacl_ds.data.scene_language import PLACE, UNSAID, Caption, relevance
from sacl_ds.evaluation.metrics import mean_average_precision, ndcg, recall_at_k
from sacl_ds.losses import Regulation
from sacl_ds.losses.weights import AnchorSums
from sacl_ds.training.false_share import falling_weights
from sacl_ds.training.schedules import learning_rate_factor
from weight_study.cache import keep_tensors, kept_tensors
from weight_study.model import MAX_TOKENS, DualEncoder, Pool, pool, trained_stem, vocabulary
from weight_study.plan import AVERAGE, Arm, Calibration, Plan
from weight_study.weights import DirectionSimilarities, contrastive, log_weights

_HELD_OUT = 1001  # seed of the held-out scenes, the same for all arms and seeds
_PART = 500  # encoded at a time, without gradient
_CALIBRATED_ON = 1024  # pairs of the training pool
_SEEDS = {"partial": 10, "simple": 200, "detailed": 400}  # plus the trial's: no two pools share a scene


@dataclass(frozen=True)
class Folder:
    """Paths of a study's trials and of what they share."""

    root: Path

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def trials(self) -> Path:
        """File with a line of JSON for each finished trial."""
        return self.root / "trials.jsonl"

    def weights(self, fingerprint: str) -> Path:
        return self.root / "models" / f"{fingerprint}.safetensors"


def run_trial(plan: Plan, name: str, seed: int, folder: Folder, device: str = "cpu") -> dict[str, Any]:
    """Train, evaluate, keep the weights and return the result. Its teacher's weights must be there."""
    start = time.perf_counter()
    arm, common, to = plan.arms[name], plan.common, torch.device(device)
    stem, tokenizer = trained_stem(common.stem, folder.cache), vocabulary(folder.cache)

    def made(count: int, seed: int, detail: str, captions: int) -> Pool:
        return pool(count, seed, detail, stem, common.stem.fingerprint, tokenizer, folder.cache, captions).to(to)

    def encoder(arm: Arm) -> DualEncoder:
        start = {} if arm.scale is None else {"scale": arm.scale}
        return DualEncoder(common.shape, common.stem.width, tokenizer.size, MAX_TOKENS, **start).to(to)

    training = made(common.scenes, _SEEDS[arm.captions] + seed, arm.captions, 4)
    torch.manual_seed(seed)
    model = encoder(arm)
    teacher = None
    if arm.teacher == AVERAGE:
        teacher = copy.deepcopy(model)
    elif arm.teacher is not None:
        teacher = encoder(plan.arms[arm.teacher]).requires_grad_(False)
        teacher.load_state_dict(kept_tensors(folder.weights(plan.fingerprint(arm.teacher, seed))))
    training_figures = _train(plan, arm, seed, model, teacher, training)
    held_out = made(common.eval_scenes, _HELD_OUT, "partial", common.eval_captions)
    fingerprint = plan.fingerprint(name, seed)
    result = {
        "fingerprint": fingerprint,
        "seed": seed,
        "settings": arm.model_dump(mode="json"),
        **_evaluate(model, held_out),
        **training_figures,
        "seconds": time.perf_counter() - start,
    }
    keep_tensors(model.state_dict(), folder.weights(fingerprint))
    return result


def _train(
    plan: Plan, arm: Arm, seed: int, model: DualEncoder, teacher: DualEncoder | None, data: Pool
) -> dict[str, Any]:
    """Train the arm; returns metrics of its regulation, as calibrated and at the end."""
    common = plan.common
    steps = arm.steps or common.steps
    if arm.scale is not None:
        model.logit_scale.requires_grad_(False)
    # a frozen teacher sees each picture and caption once, not at every step
    taught = _features(teacher, data) if teacher is not None and arm.teacher != AVERAGE else None
    found = _calibrated(arm, taught, data)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = OptimConfig(warmup_steps=common.warmup)
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=common.weight_decay)
    draws, dealer = (torch.Generator().manual_seed(1000 * seed + each) for each in (1, 2))
    figures: dict[str, list[float]] = {}
    teacher_cosine = None
    for step in range(steps):
        scenes = torch.randperm(len(data.scenes), generator=draws)[: common.batch]
        captions = scenes * data.per_scene + torch.randint(data.per_scene, scenes.shape, generator=draws)
        tokens, ids = data.tokens[scenes], data.ids[captions]
        cosine = model.image(tokens) @ model.text(ids).T
        scale = model.logit_scale()
        if taught is not None:
            teacher_cosine = taught[0][scenes] @ taught[1][captions].T
        elif teacher is not None:
            with torch.no_grad():
                teacher_cosine = teacher.image(tokens) @ teacher.text(ids).T
        seen = DirectionSimilarities(
            cosine.detach(),
            teacher_cosine,
            _negatives(data, captions),
            _relevance(arm, data, scenes, captions, cosine.device),
        )
        regulation = _regulation(arm, found, step / steps)
        losses = []
        for direction, side in ((cosine, seen), (cosine.T, seen.turned())):
            weights = log_weights(arm, regulation, side, float(scale.detach()), dealer)
            losses.append(contrastive(arm, direction, scale, weights, side.negatives).mean())
            if step >= steps - 20 and arm.weights != "hard":
                _note(figures, weights, scale.detach() * side.cosine, side.negatives)
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate * learning_rate_factor(step, steps, schedule)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if arm.teacher == AVERAGE and teacher is not None:
            with torch.no_grad():
                for average, now in zip(teacher.parameters(), model.parameters(), strict=True):
                    average.lerp_(now, 1 - min(arm.average_decay, (step + 1) / (step + 10)))
    at_end = {key: float(np.mean(values)) for key, values in figures.items()}
    return {"found": found, "weights_at_end": at_end, "logit_scale": float(model.logit_scale().detach())}


def _calibrated(arm: Arm, taught: tuple[Tensor, Tensor] | None, data: Pool) -> dict[str, float]:
    """Calibrate kappa_t, and a constant alpha where weights are to fall. taught: the frozen teacher's features."""
    if arm.teacher is None:
        return {}
    scenes = torch.arange(min(_CALIBRATED_ON, len(data.scenes)))
    captions = scenes * data.per_scene
    found = {}
    if taught is not None and (isinstance(arm.teacher_sharpness, Calibration) or arm.fall is not None):
        cosines = (taught[0][scenes] @ taught[1][captions].T).cpu().numpy()
        negatives = _negatives(data, captions).cpu().numpy()
    if isinstance(arm.teacher_sharpness, Calibration):
        wanted = arm.teacher_sharpness
        found["teacher_sharpness"] = sharpness_for(cosines, negatives, wanted.share, wanted.under)
    else:
        found["teacher_sharpness"] = arm.teacher_sharpness
    if arm.fall is not None:
        found["cosine"], found["alpha"] = falling_weights(cosines[negatives], arm.fall, found["teacher_sharpness"])
    return found


def _regulation(arm: Arm, found: dict[str, float], progress: float) -> Regulation:
    """Return the arm's regulation after that share of the steps."""
    if arm.teacher is None:
        return Regulation(0.0, arm.sharpness)
    alpha = found.get("alpha")
    if alpha is None:
        alpha = arm.alpha_start + (arm.alpha_end - arm.alpha_start) * min(1.0, progress / arm.hand_over)
    return Regulation(alpha, arm.sharpness, found["teacher_sharpness"])


@torch.no_grad()
def _features(model: DualEncoder, data: Pool) -> tuple[Tensor, Tensor]:
    """Compute the features of all pictures and all captions, a row each."""
    image = torch.cat([model.image(part) for part in data.tokens.split(_PART)])
    return image, torch.cat([model.text(part) for part in data.ids.split(_PART)])


def _negatives(data: Pool, captions: Tensor) -> Tensor:
    """Mask (n, n) bool of negatives: other pairs, but for those with the very same caption, as the package's loader has
    it."""
    same = data.said[captions]
    return same[:, None] != same


def _relevance(arm: Arm, data: Pool, scenes: Tensor, captions: Tensor, device: torch.device) -> Tensor:
    """Compute the relevance (images, texts), where an oracle asks for it."""
    if arm.family != "oracle":
        return torch.zeros(len(scenes), len(scenes), device=device)
    said = [data.captions[i] for i in captions.tolist()]
    return torch.from_numpy(relevance(said, [data.scenes[i] for i in scenes.tolist()]).T).to(device)


def _note(figures: dict[str, list[float]], weights: Tensor, z: Tensor, negatives: Tensor) -> None:
    """Note the share of the negatives under 0.7 and 0.2, their effective share, push (mass) and shape (nats)."""
    w, sums = weights[negatives].exp(), AnchorSums.of(z, weights, negatives)
    some = sums.negatives > 0
    new = {
        "under_0.7": (w < 0.7).float().mean(),
        "under_0.2": (w < 0.2).float().mean(),
        "effective_share": (sums.effective / sums.negatives)[some].mean(),
        "mass": sums.mass[some].mean(),
        "shape": sums.shape[some].mean(),
    }
    for key, value in new.items():
        figures.setdefault(key, []).append(float(value))


@torch.no_grad()
def _evaluate(model: DualEncoder, data: Pool) -> dict[str, Any]:
    """Fractions. text->image: mAP over all satisfying images, nDCG@10 of graded relevance, R@1 of any satisfying image;
    both directions: recall of the very instance; mAP by what captions say; and what a teacher is worth, the average
    precision of the cosine as a detector of matches among all pairs."""
    model.eval()
    image, text = _features(model, data)
    scores = (text @ image.T).cpu().numpy()
    graded = relevance(data.captions, data.scenes)
    satisfying = graded >= 1
    own = np.zeros_like(satisfying)
    own[np.arange(len(data.captions)), np.arange(len(data.captions)) // data.per_scene] = True
    kinds: dict[str, list[int]] = {}
    for row, caption in enumerate(data.captions):
        kinds.setdefault(_kind(caption), []).append(row)
    by_kind = {kind: mean_average_precision(scores[rows], satisfying[rows]) for kind, rows in kinds.items()}
    detector = Detector(scores[satisfying])
    detector.add(scores[~satisfying])
    forward, back = recall_at_k(scores, own, (1, 5, 10)), recall_at_k(scores.T, own.T, (1, 5, 10))
    return {
        "mAP": mean_average_precision(scores, satisfying),
        "nDCG@10": ndcg(scores, graded, 10),
        "any_R@1": recall_at_k(scores, satisfying, (1,))[1],
        **{f"text_to_image_R@{k}": value for k, value in forward.items()},
        **{f"image_to_text_R@{k}": value for k, value in back.items()},
        "mAP_by_caption": by_kind,
        "matches_AP": detector.curve().average_precision,
    }


def _kind(caption: Caption) -> str:
    if len(caption.described) > 1:
        return "two objects"
    if caption.background != UNSAID:
        return "background"
    return "one object" if caption.described[0][PLACE] == UNSAID else "one object, its place"
