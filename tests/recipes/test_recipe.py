import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from calibrant.methods.method import MethodOptions
from calibrant.methods.registry import METHODS
from calibrant.methods.training import Trainer, TrainingOptions
from calibrant.recipes import parts as parts
from calibrant.recipes.recipe import Recipe

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
        ({"drift_correction": True}, "drift_correction"),
    ],
)
def test_true_and_false_are_no_numbers(part: dict[str, Any], name: str) -> None:
    Recipe.model_validate(SAID)
    with pytest.raises(ValidationError, match=f"{name} cannot be (true|false)"):
        Recipe.model_validate({**SAID, **part})


def page() -> dict[str, dict[str, str]]:
    """Of docs/recipes.md, by heading and, where the table has one, name: keys with their defaults."""
    found: dict[str, dict[str, str]] = {}
    heading = name = ""
    for line in (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading, name = line.removeprefix("## "), ""
        if not line.startswith("|") or line.startswith(("| key", "| name", "| ---")):
            continue
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 4:
            name, cells = cells[0] or name, cells[1:]
        section = found.setdefault(f"{heading} {name}".strip(), {})
        if cells[0]:
            section[cells[0]] = cells[1]
    return found


def keys(model: type[BaseModel], without: type[BaseModel] | None = None) -> dict[str, str]:
    """Fields with their defaults as a file spells them; of those that ``without`` has too only what differs."""
    fields = {}
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            fields[name] = "--"
        else:
            fields[name] = default if isinstance(default, str) else json.dumps(default)
    shared = keys(without) if without is not None else {}
    return {name: one for name, one in fields.items() if shared.get(name) != one and (not shared or name != "name")}


def test_the_page_of_recipes_has_every_key_with_its_default() -> None:
    found = page()
    assert found.pop("recipe") == keys(Recipe)
    assert found.pop("scheme") == keys(parts.Scheme)
    assert found.pop("scheme.weights") == keys(parts.Weights)
    assert found.pop("scheme.activations") == keys(parts.Activations)
    assert found.pop("scheme.kv_cache") == keys(parts.KvCache)
    assert found.pop("scheme.lm_head") == keys(parts.Head)
    assert found.pop("budget") == keys(parts.Budget)
    assert found.pop("experts") == keys(parts.StarvedExperts)
    assert found.pop("reconstruction") == keys(parts.Reconstruction)
    assert found.pop("distillation") == keys(parts.Distillation)
    for name, method in METHODS.items():
        trained = isinstance(method, Trainer)
        own = keys(method.options, TrainingOptions if trained else MethodOptions)
        assert found.pop(f"{'training methods' if trained else 'method'} {name}") == own
    for transform in (parts.SmoothQuant, parts.Awq, parts.Quadapter):
        name = typing.get_args(transform.model_fields["name"].annotation)[0]
        assert found.pop(f"transforms {name}") == keys(transform, MethodOptions)
    assert found.pop("training methods all") == keys(TrainingOptions, MethodOptions)
    assert not found


def test_the_example_of_the_page_is_a_recipe() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert example is not None
    assert Recipe.model_validate(yaml.safe_load(example[1])).ignores("model.layers.0.mlp.up_proj")


def test_minima_and_zeros_do_not_go_together() -> None:
    said = {"name": "r", "description": "d", "method": {"name": "sparsegpt"}}
    with pytest.raises(ValidationError, match="q4_1 has minima, beside which no weight is exactly zero"):
        Recipe.model_validate({**said, "scheme": {"weights": {"type": "q4_1"}, "sparsity": "2:4"}})


def test_a_percentile_is_for_ranges_of_that_kind() -> None:
    scheme = {"weights": {"bits": 8}, "activations": {"dynamic": False, "percentile": 99}}
    with pytest.raises(ValidationError, match="percentile is for range: percentile"):
        Recipe.model_validate({**SAID, "scheme": scheme})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": {"name": "gptq", "scale_refits": 1}, "weights": {"type": "q4_0"}}, "scale_refits are for integers"),
        ({"weights": {"bits": 4, "signed_scales": True}}, "symmetric integers with a range_search"),
        (
            {"weights": {"bits": 4, "signed_scales": True, "symmetric": False, "range_search": "mse"}},
            "symmetric integers with a range_search",
        ),
        (
            {
                "method": {"name": "qat"},
                "weights": {"bits": 4, "signed_scales": True, "range_search": "mse"},
            },
            "learns its ranges, whose scales are positive",
        ),
    ],
)
def test_fitted_and_signed_scales_are_refused_where_they_have_no_place(changed: dict, said: str) -> None:
    fields = {**SAID, "method": changed.get("method", {"name": "gptq"}), "scheme": {"weights": changed["weights"]}}
    with pytest.raises(ValidationError, match=said):
        Recipe.model_validate(fields)
