"""Loading of a transformers model from its folder or hub name; what the library would fill by chance is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig
from transformers.utils import cached_file, logging

from sacl_ds.errors import CannotLoad, UserError
from sacl_ds.files import require_unchanged
from sacl_ds.model.placing import require_weights
from sacl_ds.model.starts.weights_file import is_wrapped, read_weights


@contextmanager
def quiet() -> Iterator[None]:
    """Show errors only and no bar until the block ends."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


_FILES = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")  # as they are sought


def load_settings(name: str, setting: str) -> Any:
    """Load a model's configuration. setting: what error lines call it. Raises UserError, also where a folder is not as
    its manifest says."""
    require_unchanged(Path(name), f"{setting}={name}")
    try:
        with quiet():
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged config.json makes the library raise anything
        raise CannotLoad(setting, name, error) from None


def load_pretrained(kind: Any, name: str, setting: str) -> tuple[Any, set[str], list[str]]:
    """Load a model: (model, names that the weights lack, names that the model lacks).

    kind: a class of transformers. setting: what error lines call it. Names of torch.compile, DDP and FSDP and state
    dicts inside a checkpoint are seen through. Raises UserError.
    """
    for file in _files(Path(name)):
        require_weights(file, f"{setting}={name}")
    options: dict[str, Any] = {"output_loading_info": True, "attn_implementation": "sdpa"}
    try:
        with quiet():
            model, info = kind.from_pretrained(name, **options)
            if info["missing_keys"] and any(map(is_wrapped, info["unexpected_keys"])):
                state = _state(Path(cached_file(name, "config.json")).parent, setting)
                model, info = kind.from_pretrained(None, config=model.config, state_dict=state, **options)
    except UserError:
        raise
    except Exception as error:  # as above
        raise CannotLoad(setting, name, error) from None
    return model, set(info["missing_keys"]), sorted(info["unexpected_keys"])


def _state(folder: Path, setting: str) -> dict[str, Tensor]:
    return {
        name: tensor for file in _files(folder) for name, tensor in read_weights(str(file), setting).tensors.items()
    }


def _files(folder: Path) -> list[Path]:
    """List the weights that transformers takes from a folder."""
    return next((found for pattern in _FILES if (found := sorted(folder.glob(pattern)))), [])
