"""Base class of the configuration's sections, the kinds of numbers in them, and paths that users give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

_typed: set[str] = set()


def remember_typed(value: Any) -> None:
    """Remember a setting from the command line: a text, or lists and mappings of texts."""
    if isinstance(value, str):
        _typed.add(value.strip())
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            remember_typed(inner)


def was_typed(text: str) -> bool:
    return text.strip() in _typed


_BEFORE_PATHS = ("@", "local-dir:")  # of a list of shards; of timm


def expanded(path: str) -> str:
    """Expand `~`, also after `@` and `local-dir:`; other text, such as a hub name, is returned as it is."""
    before = next((each for each in _BEFORE_PATHS if path.startswith(each)), "")
    return before + os.path.expanduser(path.removeprefix(before))


PathText = Annotated[str, AfterValidator(expanded)]  # a setting


def user_path(path: str | os.PathLike[str]) -> Path:
    """Convert a path that a user gave to a Path; for argparse's `type` and for arguments in Python."""
    return Path(expanded(os.fspath(path)))


def _of_64_bits(value: int) -> int:
    """Refuse integers that PyTorch and NumPy cannot hold."""
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

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans for numbers: YAML reads yes, no, on and off as booleans, and pydantic these as 1 and 0."""
        inner = list(value.values()) if isinstance(value, dict) else value
        values = inner if isinstance(inner, (list, tuple)) else [inner]
        if any(isinstance(each, bool) for each in values):
            kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
            if kinds & {int, float} and not kinds & {bool, Any}:
                raise PydanticCustomError("truth_value", "Input should be a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """List the types that an annotation is made of."""
    if get_origin(annotation) is Literal:
        return {type(each) for each in get_args(annotation)}
    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return {kind for each in inner for kind in _kinds(each)} if inner else {annotation}
