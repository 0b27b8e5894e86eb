"""Base class of all parts of a recipe, which rejects invalid values instead of converting them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """Immutable model that rejects unknown keys, infinite numbers and booleans in place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_booleans_as_numbers(cls, values: Any) -> Any:
        fields = cls.model_fields
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in fields and fields[name].annotation is not bool:
                raise ValueError(f"{name} cannot be {str(value).lower()}")
        return values
