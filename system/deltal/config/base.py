"""What all settings share: strict keys, immutable, and the kinds of numbers they hold."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_switch(value: Any) -> Any:
    """Python takes true for 1; in a settings file it is a slip."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted here")
    return value


Real = Annotated[float, BeforeValidator(_no_switch)]
Positive = Annotated[int, BeforeValidator(_no_switch), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_no_switch), Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0.0)]
Seed = Annotated[int, BeforeValidator(_no_switch), Field(ge=-(2**63), le=2**63)]
"""Any that torch takes; negative ones too."""
Decay = Annotated[Real, Field(ge=0.0, lt=1.0)]


class Settings(BaseModel):
    """Base of all settings: strict keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
