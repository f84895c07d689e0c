"""Image encoder: a timm vision transformer with a [CLS] token; uint8 pixels in, tokens out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from sacl_ds.config import PatchSelectionConfig
from sacl_ds.data.batch import take
from sacl_ds.errors import CannotLoad, UserError
from sacl_ds.model.placing import require_finite, require_none_lacking

if TYPE_CHECKING:
    from sacl_ds.model.patch_selection import Scored


class ImageStates(NamedTuple):
    """Output of the image encoder for b images. A tuple, since ZeRO 3 looks for tensors in those alone.

    tokens: (b, P, width), [CLS] first; of them come the image's features. scored: where a text that is known later
    begins to choose among patches (`ImageEncoder.guided`); None where nothing is left to choose. places: (b, kept)
    int64, the patches that are among `tokens`, where some are not.
    """

    tokens: Tensor
    scored: Scored | None = None
    places: Tensor | None = None

    def at(self, images: Tensor) -> ImageStates:
        """Select the states of the images at these (n,) indices; with `scored`, patches are not yet selected."""
        if self.scored is None:
            return ImageStates(take(self.tokens, images), None, None if self.places is None else self.places[images])
        scored = self.scored.at(images)
        return ImageStates(scored.tokens, scored)


class ImageEncoder(nn.Module):
    """Image encoder, (b, 3, H, W) uint8 -> `ImageStates`. Pixels are normalised here, on the device."""

    mean: Tensor
    std: Tensor
    selection = PatchSelectionConfig()  # none
    layers: Sequence[int] = ()  # at which patches are selected, from 1

    def __init__(
        self,
        name: str,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        pretrained: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            self.vit = timm.create_model(name, img_size=image_size, num_classes=0, **(arguments or {}))
            if pretrained:
                _load_published(self.vit, f"model.image_encoder={name}")
        except UserError:
            raise
        except OSError as error:  # what fetching weights raises
            raise CannotLoad("model.image_encoder", name.removeprefix("local-dir:"), error) from None
        except Exception as error:  # of arguments that the architecture does not take
            raise UserError(f"model.image_encoder={name!r}: {error}") from error
        if getattr(self.vit, "num_prefix_tokens", 0) != 1 or not hasattr(self.vit, "forward_features"):
            raise UserError(f"model.image_encoder={name!r}: choose a timm vision transformer with one [CLS] token")
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.width: int = self.vit.num_features

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes each block's activations instead of storing them."""
        self.vit.set_grad_checkpointing(on)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each block; halves of one between which patches are selected run as they are."""
        for block in getattr(self.vit, "blocks", ()):
            block.compile(backend=backend)

    def forward(self, images: Tensor, guide: Tensor | None = None) -> ImageStates:
        """Encode images. guide: (b, width) [CLS] states of texts, which only patch selection uses."""
        return ImageStates(self.vit.forward_features(self._normalised(images)))

    def guided(self, states: ImageStates, guide: Tensor, images: Tensor | None = None) -> ImageStates:
        """Images as n texts are to see them. guide: (n, width), [CLS] states of the texts. images: (n,) indices into
        the batch, None for one text each, in order. Nothing is left to choose in what is returned."""
        return states if images is None else states.at(images)

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def _load_published(vit: nn.Module, label: str) -> None:
    """Load timm's weights of that model, all of them: without a classifier timm leaves at chance what they lack."""
    lacking: list[str] = []
    hook = vit.register_load_state_dict_post_hook(lambda _, names: lacking.extend(names.missing_keys))
    filter_fn = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if "flexi" in label and filter_fn:  # as timm does
        filter_fn = partial(filter_fn, interpolation="bilinear", antialias=False)
    timm.models.load_pretrained(vit, num_classes=0, filter_fn=filter_fn, strict=False)
    hook.remove()
    require_none_lacking(lacking, label)
    require_finite(vit.state_dict(), label)
