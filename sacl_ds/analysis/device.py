"""Choice of the device on which the analysis tools compute."""

from __future__ import annotations

import torch

from sacl_ds.errors import UserError


def device_named(name: str | None) -> torch.device:
    """Return the named device; by default a GPU if there is one, else the CPU. Raises UserError for one that cannot be
    used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
