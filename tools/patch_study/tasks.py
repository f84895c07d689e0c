"""The two tasks of the study: questions about scenes, and pre-training (ITC + ITM + MLM) on their captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from weight_study.cache import kept_tensors

from patch_study.plan import PatchArm, Sizes
from patch_study.start import cells_of_patches, image_start, pictures
from sacl_ds.config import LossConfig
from sacl_ds.data.batch import Batch
from sacl_ds.data.scene_language import COLOUR, COLOURS, PLACE, SHAPE, SHAPES, Scene, relevance
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import IGNORED, Tokenizer, attention_mask, mask_tokens, pad, train_wordpiece
from sacl_ds.evaluation.metrics import mean_average_precision, recall_at_k
from sacl_ds.model.sacl import SaclModel, predicted_tokens
from sacl_ds.model.vision import ImageStates
from sacl_ds.training.objective import PretrainObjective, Targets

HELD_OUT = 1001  # seed of the held-out scenes, the same for all arms and seeds
_TRAINING = 10  # plus the trial's: no two pools share a scene
_WORDS_FROM, _WORDS_SEED = 2000, 78  # scenes whose sentences give the vocabulary and the answers of all seeds
_PART = 250
_RERANKED = 4
_MASKED = 0.15
_ABOUT_ONE = ("colour", "texture", "place", "shape")  # kinds of questions that name an object by shape or colour


class StudyTask:
    """Task of the study: a model, its trained module, a loss for rows, and metrics on held-out scenes."""

    model: SaclModel
    module: nn.Module
    rows: int

    def loss(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def evaluate(self) -> dict[str, Any]:
        raise NotImplementedError


def build(arm: PatchArm, sizes: Sizes, seed: int, folder: Path) -> StudyTask:
    """Build an arm's task with new text and fusion encoders; the image encoder's weights come from `folder`."""
    kind: Callable[[PatchArm, Sizes, int, Path], StudyTask] = {"vqa": QuestionAnswering, "pretrain": Pretraining}[
        arm.task
    ]
    task = kind(arm, sizes, seed, folder)
    task.model.image_encoder.load_state_dict(kept_tensors(image_start(sizes, folder)))
    return task


@dataclass
class _SceneQuestions:
    """Questions about scenes: (n,) scene, ids and mask (n, L), (n,) answer, kinds, and (n, CELLS) of what is asked."""

    scene: Tensor
    ids: Tensor
    mask: Tensor
    answer: Tensor
    kinds: list[str]
    places: list[int]  # of the object that is asked about


class QuestionAnswering(StudyTask):
    """Question answering: a linear head on the fused [CLS] picks from a closed list; the tower runs once, guided."""

    def __init__(self, arm: PatchArm, sizes: Sizes, seed: int, folder: Path) -> None:
        training, held_out = trial_scenes(sizes, seed)
        asked = [self.questions(training, index) for index in range(len(training))]
        known = Scenes(_WORDS_FROM, _WORDS_SEED)
        examples = [one for index in range(len(known)) for one in self.questions(known, index)]
        self.answers = sorted({answer for _, _, answer in examples})
        tokenizer = _tokenizer([question for _, question, _ in examples], sizes, arm)
        self.tokenizer = tokenizer
        self.training = self._asked(training, asked, tokenizer)
        self.held_out = self._asked(held_out, [self.questions(held_out, i) for i in range(len(held_out))], tokenizer)
        self.scenes, self.cells = held_out, cells_of_patches(sizes)
        self.images, self.held_out_images = pictures(training, folder), pictures(held_out, folder)
        torch.manual_seed(seed)
        self.model = SaclModel(sizes.model(arm.selection), tokenizer.size, pretrained=False)
        self.head = nn.Linear(sizes.width, len(self.answers))
        self.module = nn.ModuleList([self.model, self.head])
        self.rows = len(self.training.answer)

    @staticmethod
    def questions(scenes: Scenes, index: int) -> list[tuple[str, str, str]]:
        """List (kind, question, answer) of the questions about one object."""
        return [one for one in scenes.questions(index) if one[0] in _ABOUT_ONE]

    def _asked(
        self, scenes: Scenes, asked: Sequence[list[tuple[str, str, str]]], tokenizer: Tokenizer
    ) -> _SceneQuestions:
        flat = [(index, *one) for index, some in enumerate(asked) for one in some]
        rows = tokenizer.ids([question for _, _, question, _ in flat])
        return _SceneQuestions(
            torch.tensor([index for index, *_ in flat]),
            torch.from_numpy(pad(rows, tokenizer.pad_id)),
            torch.from_numpy(attention_mask(rows)),
            torch.tensor([self.answers.index(answer) for *_, answer in flat]),
            [kind for _, kind, *_ in flat],
            [_place_of(scenes.scene(index), kind, question) for index, kind, question, _ in flat],
        )

    def _answer(self, images: Tensor, asked: _SceneQuestions, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        longest = int(asked.mask[rows].sum(1).max())
        mask = asked.mask[rows, :longest]
        states, _ = self.model.encode_text(asked.ids[rows, :longest], mask)
        seen = self.model.image_encoder(images[asked.scene[rows]], states[:, 0])
        return self.head(self.model.fuse(states, mask, seen.tokens)[:, 0]), seen.places

    def loss(self, rows: Tensor) -> Tensor:
        logits, _ = self._answer(self.images, self.training, rows)
        return nn.functional.cross_entropy(logits, self.training.answer[rows])

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Evaluate accuracy, also by kind of question, and shares of patches kept, in per one.

        kept_asked: of the object that is asked about; kept_objects: of all objects.
        """
        right: list[bool] = []
        kept: dict[str, list[float]] = {"asked": [], "objects": []}
        asked = self.held_out
        for rows in torch.arange(len(asked.answer)).split(_PART):
            logits, places = self._answer(self.held_out_images, asked, rows)
            right += (logits.argmax(1) == asked.answer[rows]).tolist()
            for row, own in zip(rows.tolist(), [] if places is None else places, strict=False):
                cells = self.cells[own]
                objects = [thing[PLACE] for thing in self.scenes.scene(int(asked.scene[row])).objects]
                everywhere = torch.isin(self.cells, torch.tensor(objects)).sum()
                kept["objects"].append(float(torch.isin(cells, torch.tensor(objects)).sum() / everywhere))
                here = asked.places[row]
                kept["asked"].append(float((cells == here).sum() / (self.cells == here).sum()))
        kinds: dict[str, list[bool]] = {}
        for kind, one in zip(asked.kinds, right, strict=True):
            kinds.setdefault(kind, []).append(one)
        return {
            "accuracy": float(np.mean(right)),
            "by_kind": {kind: float(np.mean(some)) for kind, some in kinds.items()},
            **{f"kept_{what}": float(np.mean(values)) for what, values in kept.items() if values},
        }


def _place_of(scene: Scene, kind: str, question: str) -> int:
    """Return the grid cell of the one object that a question names by its shape or its colour."""
    attribute, names = {"shape": (COLOUR, COLOURS)}.get(kind, (SHAPE, SHAPES))
    return next(thing[PLACE] for thing in scene.objects if names[thing[attribute]] in question.split())


@dataclass
class _Captioned:
    """Scenes with k captions each: ids, mask, masked ids and labels (n * k, L)."""

    images: Tensor
    ids: Tensor
    mask: Tensor
    masked: Tensor
    labels: Tensor
    per_scene: int
    relevance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def batch(self, rows: Tensor) -> Batch:
        """Make a batch of the captions at `rows`."""
        longest = int(self.mask[rows].sum(1).max())
        scene = rows // self.per_scene
        names = [str(int(index)) for index in scene]
        ids, mask, masked, labels = (x[rows, :longest] for x in (self.ids, self.mask, self.masked, self.labels))
        return Batch(names, names, names, self.images[scene], ids, mask, scene[:, None], masked, labels)


class Pretraining(StudyTask):
    """Pre-training with the package's objective: InfoNCE, all three losses."""

    def __init__(self, arm: PatchArm, sizes: Sizes, seed: int, folder: Path) -> None:
        training, held_out = trial_scenes(sizes, seed)
        known = Scenes(_WORDS_FROM, _WORDS_SEED)
        said = [caption.text for index in range(len(known)) for caption in known.captions(index)]
        tokenizer = _tokenizer(said, sizes, arm)
        self.training, self.held_out = (self._captioned(each, tokenizer, folder) for each in (training, held_out))
        captions = [caption for index in range(len(held_out)) for caption in held_out.captions(index)]
        self.held_out.relevance = relevance(captions, [held_out.scene(i) for i in range(len(held_out))]) >= 1
        torch.manual_seed(seed)
        self.model = SaclModel(sizes.model(arm.selection), tokenizer.size, pretrained=False)
        self.module = PretrainObjective(self.model, LossConfig(contrastive="infonce"))
        self.rows = len(self.training.ids)
        self.generator = torch.Generator().manual_seed(seed)
        self.itc: list[float] = []

    @staticmethod
    def _captioned(scenes: Scenes, tokenizer: Tokenizer, folder: Path) -> _Captioned:
        rows = tokenizer.ids([caption.text for i in range(len(scenes)) for caption in scenes.captions(i)])
        hidden = [mask_tokens(row, tokenizer, _MASKED, (scenes.seed, number)) for number, row in enumerate(rows)]
        padded = (
            pad(rows, tokenizer.pad_id),
            attention_mask(rows),
            pad([ids for ids, _ in hidden], tokenizer.pad_id),
            pad([labels for _, labels in hidden], IGNORED),
        )
        ids, mask, masked, labels = (torch.from_numpy(each) for each in padded)
        return _Captioned(pictures(scenes, folder), ids, mask, masked, labels, scenes.captions_per_scene)

    def loss(self, rows: Tensor) -> Tensor:
        losses = self.module(self.training.batch(rows), Targets(None, 0.0, self.generator))
        self.itc.append(float(losses["itc"].detach()))
        return losses["loss"]

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held out, in per one.

        ITC alone, of images that no text guides: mAP, any_R@1 (any picture that the caption is true of), own_R@1 (the
        very picture). told_R@1: the same of the first captions, every image guided by its own, which is what
        `published` trains. reranked_any_R@1: the best 4 of ITC put in order by ITM. mlm: accuracy.
        itc_training, itc_held_out: the loss on batches of one size, the first from the last steps.
        """
        data, model = self.held_out, self.model
        texts = [self._texts(rows) for rows in torch.arange(len(data.ids)).split(_PART)]
        text = torch.cat([features for _, features in texts])
        guides = torch.cat([states for states, _ in texts])
        seen, image = model.encode_image(data.images)
        scores = (text @ image.T).numpy()
        own = np.arange(len(text))[:, None] // data.per_scene == np.arange(len(image))
        first = torch.arange(len(image)) * data.per_scene
        told = model.encode_image(data.images, guides[first])[1]
        return {
            "mAP": mean_average_precision(scores, data.relevance),
            "any_R@1": recall_at_k(scores, data.relevance, (1,))[1],
            "own_R@1": recall_at_k(scores, own, (1,))[1],
            "told_R@1": recall_at_k((text[first] @ told.T).numpy(), np.eye(len(image), dtype=bool), (1,))[1],
            "reranked_any_R@1": self._reranked(scores, seen),
            "mlm": self._masked_words(seen),
            "itc_training": float(np.mean(self.itc[-20:])),
            "itc_held_out": self._held_out_itc(image, text),
        }

    def _texts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        states, features = self.model.encode_text(self.held_out.ids[rows], self.held_out.mask[rows])
        return states[:, 0], features

    def _reranked(self, scores: np.ndarray, seen: ImageStates) -> float:
        """Return any_R@1 of ITM among the images that ITC ranks first."""
        data, model = self.held_out, self.model
        candidates = torch.from_numpy(np.argsort(-scores, axis=1, kind="stable")[:, :_RERANKED].copy())
        found: list[bool] = []
        for rows in torch.arange(len(candidates)).split(_PART // _RERANKED):
            which = rows.repeat_interleave(_RERANKED)
            states, _ = model.encode_text(data.ids[which], data.mask[which])
            tokens = model.image_tokens(seen, states[:, 0], candidates[rows].flatten())
            fused = model.fuse(states, data.mask[which], tokens)
            best = model.match_logits(fused).diff(dim=1).view(len(rows), -1).argmax(1)
            chosen = candidates[rows].gather(1, best[:, None])[:, 0]
            found += data.relevance[rows.numpy(), chosen.numpy()].tolist()
        return float(np.mean(found))

    def _masked_words(self, seen: ImageStates) -> float:
        """Return the share of the masked tokens that MLM predicts right."""
        data, hits = self.held_out, []
        for rows in torch.arange(len(data.ids)).split(_PART):
            batch = data.batch(rows)
            right = predicted_tokens(self.model, seen.at(rows // data.per_scene), batch).argmax(1)
            assert batch.mlm_labels is not None
            hits.append(right == batch.mlm_labels[batch.mlm_labels != IGNORED])
        return float(torch.cat(hits).float().mean())

    def _held_out_itc(self, image: Tensor, text: Tensor, size: int = 64) -> float:
        """Mean ITC loss of held-out batches with one caption a scene."""
        scale = self.model.logit_scale()
        losses = []
        for start in range(0, len(image) - size + 1, size):
            part = torch.arange(start, start + size)
            z = scale * image[part] @ text[part * self.held_out.per_scene].T
            own = torch.arange(size)
            losses.append((nn.functional.cross_entropy(z, own) + nn.functional.cross_entropy(z.T, own)) / 2)
        return float(torch.stack(losses).mean())


def trial_scenes(sizes: Sizes, seed: int) -> tuple[Scenes, Scenes]:
    """Return the training scenes and the held-out scenes."""
    training = Scenes(sizes.scenes, _TRAINING + seed, sizes.image_size)
    return training, Scenes(sizes.held_out, HELD_OUT, sizes.image_size)


def _tokenizer(said: list[str], sizes: Sizes, arm: PatchArm) -> Tokenizer:
    settings = sizes.model(arm.selection)
    return Tokenizer(train_wordpiece(said, 400), settings.max_tokens)
