"""Export of checkpoints to other libraries' formats."""

from sacl_ds.exporting.export import DTYPES, FORMS, export

__all__ = ["DTYPES", "FORMS", "export"]
