"""What every room of a configuration is, and the kinds of numbers in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _of_64_bits(value: int) -> int:
    """What PyTorch and NumPy hold."""
    if value >= 2**63:
        raise ValueError("a whole number here is less than 2^63")
    return value


Positive = Annotated[int, Field(gt=0), AfterValidator(_of_64_bits)]
Natural = Annotated[int, Field(ge=0), AfterValidator(_of_64_bits)]
PositiveFloat = Annotated[float, Field(gt=0)]
NaturalFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Room(BaseModel):
    """Unknown keys are errors, numbers are finite, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=False, validate_default=True, frozen=True, allow_inf_nan=False)
