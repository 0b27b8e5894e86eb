"""What every part of a recipe is: read from a file that people write, and refused rather than guessed at."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """A part of a recipe: no key that it does not know, no true or false as a number, nothing that changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_as_number(cls, values: Any) -> Any:
        fields = cls.model_fields
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in fields and fields[name].annotation is not bool:
                raise ValueError(f"{name} cannot be {str(value).lower()}")
        return values
