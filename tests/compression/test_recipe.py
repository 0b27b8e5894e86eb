from typing import Any

import pytest
from pydantic import ValidationError

from calibrant.compression.recipe import Recipe

SAID: dict[str, Any] = {
    "name": "r",
    "description": "d",
    "method": {"name": "gptq"},
    "scheme": {"weights": {"bits": 4, "symmetric": True}},
}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"method": {"name": "gptq", "damping": True}}, "damping"),
        ({"method": {"name": "gptq", "refine_sweeps": False}}, "refine_sweeps"),
        ({"scheme": {"weights": {"bits": 4, "group_size": True}}}, "group_size"),
        ({"asymmetric": True}, "asymmetric"),
    ],
)
def test_true_and_false_are_no_numbers(part: dict[str, Any], name: str) -> None:
    Recipe.model_validate(SAID)
    with pytest.raises(ValidationError, match=f"{name} cannot be (true|false)"):
        Recipe.model_validate({**SAID, **part})
