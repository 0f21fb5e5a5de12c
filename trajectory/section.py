"""The base of every configuration section."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LONGEST_S = 1e8
"""Three years, in seconds. The system's own limit is somewhat higher (`threading.TIMEOUT_MAX` is 9.2e9 s)."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that numpy, torch and vLLM all accept."""


class Section(BaseModel):
    """One room's settings: frozen and typed, with every field documented by the string below it. Unknown keys are errors,
    and so are numbers that aren't finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _can_be_waited_for(cls, value: Any, info: ValidationInfo) -> Any:
        """Check a field whose name ends in `_s`, which is a time in seconds."""
        if str(info.field_name).endswith("_s") and isinstance(value, int | float) and value > LONGEST_S:
            raise ValueError(f"a time of {value:g} s is longer than can be waited for; at most {LONGEST_S:g}")
        return value
