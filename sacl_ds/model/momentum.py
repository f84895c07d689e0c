"""Momentum model, the exponential moving average, and the queue of its features (ALBEF's momentum parts).

Both lie outside the engine's module, whole on every rank: ZeRO shards and saves only what is trained. Nothing here
changes but by `update` and `push`, after the optimizer's step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from sacl_ds.config import MomentumConfig
from sacl_ds.data.batch import Batch
from sacl_ds.distributed import gather_rows, row_counts
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel, autocast, predicted_tokens

_AVERAGE, _QUEUE, _SIZE, _TEACHER = "average.", "queue.", "size", "teacher"
_BYTES, _BYTES_IDS = 4, 3 * 8  # of a float32; of image, caption and group


class Momentum:
    """Momentum model and its queue.

    average: the averaged model, in eval mode, without gradient, in the model's own precision (float32); its logit scale
    is the trained model's. queue: earlier pairs, on the same device.
    """

    def __init__(
        self, model: SaclModel, settings: MomentumConfig, device: torch.device | None = None, teacher: str = ""
    ) -> None:
        """The average starts equal to `model`, whose parameters must be whole: before an engine shards them.

        teacher: the identity of the teacher whose features the queue holds too; "" where it holds none.
        """
        self.settings, self.teacher = settings, teacher
        self.average = copy.deepcopy(model).requires_grad_(False).eval().to(device)
        self.queue = Queue(settings.queue_size)

    @torch.no_grad()
    def outputs(self, batch: Batch, tokens: bool, precision: str) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Compute the average's (b, d) features of images and captions, and its logits of the masked tokens.

        tokens: compute the (n, vocabulary) logits, from images as the average sees them. precision: of the products, as
        `train.precision` names it.
        """
        model = self.average
        with autocast(batch.images.device, precision):
            text_states, text = model.encode_text(batch.input_ids, batch.attention_mask, batch.token_places)
            image_states, image = model.encode_image(batch.images, text_states[:, 0] if model.captions_choose else None)
            return (image, text), predicted_tokens(model, image_states, batch) if tokens else None

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """average <- decay * average + (1 - decay) * parameter, for all of the model's parameters by name.

        parameters: whole tensors, each good only until the next is asked for. Raises ValueError where one is missing.
        """
        averages = dict(self.average.named_parameters())
        for name, parameter in parameters:
            average = averages.pop(name)
            if name.startswith("logit_scale."):
                average.copy_(parameter)
            else:
                average.mul_(self.settings.decay).add_(parameter.to(average), alpha=1 - self.settings.decay)
        if averages:
            raise ValueError(f"no value came for {', '.join(averages)}")

    def push(self, image: Tensor, text: Tensor, pair_ids: Tensor, teacher: tuple[Tensor, Tensor] | None = None) -> None:
        """Push the pairs of all ranks into the queue, in rank order; every rank calls it.

        image, text: (b, d) momentum features of this rank's pairs, as they were at this step. pair_ids: (b, k) int64.
        teacher: (b, d_t) its features; left out where the queue holds none.
        """
        if not self.queue.size:
            return
        columns = {"image": image, "text": text}
        if self.teacher:
            assert teacher is not None
            columns |= {"teacher_image": teacher[0].to(image), "teacher_text": teacher[1].to(image)}
        counts = row_counts(image)
        together = gather_rows(torch.cat(list(columns.values()), 1), counts)
        parts = together.split([column.shape[1] for column in columns.values()], 1)
        ids = gather_rows(pair_ids, counts)
        self.queue.push({**dict(zip(columns, parts, strict=True)), "ids": ids})

    @property
    def fill(self) -> float:
        """Share of the queue that holds pairs; 1 where there is none."""
        return self.queue.filled / self.queue.size if self.queue.size else 1.0

    def state(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs, by name; the same on all ranks."""
        average = {_AVERAGE + name: value for name, value in self.average.state_dict().items()}
        queue = {_QUEUE + name: value for name, value in self.queue.state().items()}
        identity = torch.frombuffer(bytearray(self.teacher.encode() or b"-"), dtype=torch.uint8)
        return average | queue | {_QUEUE + _SIZE: torch.tensor(self.queue.size), _QUEUE + _TEACHER: identity}

    def restore(self, state: dict[str, Tensor], where: str, id_columns: int) -> None:
        """Go on from a saved state.

        where: what error lines call it; id_columns: how many ids a pair has. Raises UserError where the queue has
        another size, other ids, or lacks this teacher's features.
        """
        device = next(self.average.parameters()).device
        average, queue = (
            {name.removeprefix(room): value.to(device) for name, value in state.items() if name.startswith(room)}
            for room in (_AVERAGE, _QUEUE)
        )
        size = int(queue.pop(_SIZE))
        if size != self.queue.size:
            raise UserError(
                f"--resume: {where} holds a queue of momentum.queue_size={size}, not {self.queue.size}; resume with "
                f"momentum.queue_size={size}, or start anew in another output_dir"
            )
        if "ids" in queue and queue["ids"].shape[1] != id_columns:
            raise UserError(
                f"--resume: {where} holds a queue of pairs with {queue['ids'].shape[1]} ids each, not {id_columns}; "
                "resume with data.duplicates and data.grouping as they were, or start anew in another output_dir"
            )
        names = ("teacher_image", "teacher_text")
        whose = bytes(queue.pop(_TEACHER).tolist()).decode()
        if self.teacher and "image" in queue and names[0] not in queue:
            raise UserError(
                f"--resume: {where} holds a queue without a teacher's features, which momentum.regulate_queue=true "
                "needs; resume with momentum.regulate_queue=false, or start anew in another output_dir"
            )
        if self.teacher and names[0] in queue and whose != self.teacher:
            raise UserError(
                f"--resume: {where} holds a queue with the features of another teacher; resume with that "
                "teacher.checkpoint, or start anew in another output_dir"
            )
        if not self.teacher:
            queue = {name: column for name, column in queue.items() if name not in names}
        self.average.load_state_dict(average)
        self.queue.restore(queue)


def saved_bytes(settings: MomentumConfig, parameters: int, width: int, teacher_width: int) -> int:
    """Bound the bytes of `state` on disk, with a full queue; widths are those of features, 0 of no teacher's."""
    if not settings.enabled:
        return 0
    return parameters * _BYTES + settings.queue_size * (2 * (width + teacher_width) * _BYTES + _BYTES_IDS)


class Queue:
    """Ring buffer of the last `size` pairs: rows of named columns, first in, first out.

    It starts empty and grows; once full, what comes replaces the oldest. Nothing is drawn to fill it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.filled = 0  # rows that hold a pair: the first ones
        self._next = 0  # the row that is written next
        self._columns: dict[str, Tensor] = {}

    def push(self, rows: dict[str, Tensor]) -> None:
        """Append rows. rows: (n, ...) a column, the same columns every time; n may be anything, also more than fit."""
        count = len(next(iter(rows.values())))
        if self.size == 0 or count == 0:
            return
        if not self._columns:
            self._columns = {name: row.new_zeros(self.size, *row.shape[1:]) for name, row in rows.items()}
        if rows.keys() != self._columns.keys():
            raise ValueError(f"the queue holds {', '.join(self._columns)}, not {', '.join(rows)}")
        kept = min(count, self.size)
        device = next(iter(rows.values())).device
        places = (self._next + count - kept + torch.arange(kept, device=device)) % self.size
        for name, row in rows.items():
            self._columns[name][places] = row[count - kept :].detach().to(self._columns[name].dtype)
        self._next = (self._next + count) % self.size
        self.filled = min(self.size, self.filled + count)

    def __getitem__(self, name: str) -> Tensor | None:
        """Return (filled, ...) rows of a column, not in the order of their age; None while there are none."""
        return self._columns[name][: self.filled] if self.filled and name in self._columns else None

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs: what is filled, a column each, and `next`."""
        state = {name: column[: self.filled] for name, column in self._columns.items()}
        return state | {"next": torch.tensor(self._next)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load the saved state of a queue of the same size."""
        columns = {name: column for name, column in state.items() if name != "next"}
        self._next = int(state["next"])
        self.filled = len(next(iter(columns.values()))) if columns else 0
        self._columns = {}
        for name, column in columns.items():
            self._columns[name] = column.new_zeros(self.size, *column.shape[1:])
            self._columns[name][: self.filled] = column
