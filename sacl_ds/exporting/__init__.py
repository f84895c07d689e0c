"""Checkpoints as others load them."""

from sacl_ds.exporting.export import DTYPES, FORMS, export

__all__ = ["DTYPES", "FORMS", "export"]
