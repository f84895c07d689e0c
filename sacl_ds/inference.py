"""Inference with a trained model in a program of one's own: pictures and texts in, features and matches out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sacl_ds.config.room import user_path
from sacl_ds.data.batch import places_of
from sacl_ds.data.images import BadImage
from sacl_ds.data.pictures import Picture
from sacl_ds.data.text import Tokenizer, attention_mask, pad
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import load_model
from sacl_ds.model.vision import ImageStates

Images = Sequence[Image.Image | str | Path] | Tensor
_LABEL = "sacl_ds.load"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PairModel:
    """Trained model for inference.

    Images are paths of files, images of Pillow's, or one uint8 tensor (n, 3, H, W); of each the middle square.

    Texts are strings, cut to the longest that the model was trained with. batch_size: so many go through the model at
    once. Results are float32, on `device`, without gradient.
    """

    def __init__(
        self, model: SaclModel, tokenizer: Tokenizer, image_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Move the model to the device and cast its encoders. model: in float32."""
        self.model = model.requires_grad_(False).eval().to(device)
        if dtype != torch.float32:
            # not the pixels' mean and deviation, nor the temperature
            for part in (model.image_encoder.vit, model.text_encoder, model.fusion_encoder):
                part.to(dtype)
        self.tokenizer, self.image_size, self.device, self.dtype = tokenizer, image_size, device, dtype
        self._view = CanonicalView(image_size)

    @property
    def logit_scale(self) -> float:
        """1 / temperature: what cosines were multiplied by in training."""
        return float(self.model.logit_scale())

    @torch.no_grad()
    def encode_image(self, images: Images, *, batch_size: int = 64) -> Tensor:
        """Encode images to (n, d) unit features. Raises UserError, naming the image that cannot be read."""
        return self._joined([features for _, features in self._images(images, batch_size)])

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Encode texts to (n, d) unit features."""
        return self._joined([features for _, _, features in self._texts(texts, batch_size)])

    def similarity(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Return the (n, m) cosines of n images with m texts."""
        return self.encode_image(images) @ self.encode_text(texts).T

    @torch.no_grad()
    def match(self, images: Images, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Return (n,) probabilities, by the fusion encoder, that image i and text i belong together."""
        if len(images) != len(_listed(texts)):
            raise UserError(f"match: {len(images)} images and {len(texts)} texts; give one text for each image")
        found = []
        pairs = zip(self._images(images, batch_size), self._texts(texts, batch_size), strict=True)
        for (image, _), (states, mask, _) in pairs:
            with self._half():
                tokens = self.model.image_tokens(image, states[:, 0])
                fused = self.model.fuse(states, mask, tokens, places=places_of(mask))
                found.append(self.model.match_logits(fused).float().softmax(1)[:, 1])
        return torch.cat(found) if found else torch.empty(0, device=self.device)

    def _images(self, images: Images, batch_size: int) -> Iterator[tuple[ImageStates, Tensor]]:
        if isinstance(images, (str, Path, Image.Image)):
            raise UserError("images: give a list of them, also of one")
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3):
            raise UserError(f"images: {images.dtype} {tuple(images.shape)}; give uint8 (n, 3, H, W), or a list")
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([self._pixels(i, images[i]) for i in range(len(images))[start : start + batch_size]])
            with self._half():
                yield self.model.encode_image(pixels.to(self.device))

    def _pixels(self, number: int, image: Image.Image | str | Path | Tensor) -> Tensor:
        named = f"images[{number}]" + (f"={image}" if isinstance(image, (str, Path)) else "")
        try:
            if isinstance(image, Tensor):
                return self._view(Picture(image.cpu()), ())
            if isinstance(image, Image.Image):
                return self._view(Picture.of(image), ())
            return self._view(Picture(user_path(image).read_bytes()), ())
        except (OSError, BadImage) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{named}: {reason}; give a JPEG, PNG or WebP") from None
        except TypeError:
            raise UserError(f"{named} is of type {type(image).__name__}; give a path or an image of Pillow's") from None

    def _texts(self, texts: Sequence[str], batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Encode texts to states, mask and features."""
        rows = self.tokenizer.ids(_listed(texts)) if len(texts) else []
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            ids = torch.from_numpy(pad(some, self.tokenizer.pad_id)).to(self.device)
            mask = torch.from_numpy(attention_mask(some)).to(self.device)
            with self._half():
                states, features = self.model.encode_text(ids, mask, places_of(mask))
            yield states, mask, features

    def _half(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        width = self.model.image_projection.out_features
        return torch.cat(parts) if parts else torch.empty(0, width, device=self.device)


def load_pair_model(
    folder: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> PairModel:
    """Load a finished run or its export for inference; documented at `sacl_ds.load`."""
    path = user_path(folder)
    if (path / "config.json").is_file() and not (path / "config.yaml").exists():
        raise UserError(
            f"{_LABEL}: {folder} is an export for transformers, which AutoModel.from_pretrained loads; give a finished "
            "run, or an export of it with --to safetensors"
        )
    chosen, half = _device(device), _dtype(dtype)
    model, run, tokenizer = load_model(path, _LABEL)
    return PairModel(model, tokenizer, run.model.image_size, chosen, half)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"{_LABEL}: device={device!r}: no such device; give e.g. 'cpu' or 'cuda:0'") from None


def _dtype(dtype: Any) -> torch.dtype:
    found = _DTYPES.get(str(dtype or "float32").removeprefix("torch."))
    if found is None:
        raise UserError(f"{_LABEL}: dtype={dtype}: choose {', '.join(_DTYPES)}")
    return found


def _listed(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError("texts: give a list of strings, also of one")
    return texts
