"""Recipes: which method, onto which scheme, for which layers; validated, named, readable as YAML."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from calibrant.errors import CalibrantError
from calibrant.formats.quantized import STORED_WIDTHS
from calibrant.methods.method import MethodOptions, Statistic
from calibrant.methods.registry import METHODS
from calibrant.quantization.grids import RangeSearch
from calibrant.quantization.statistics import Hessian, HessianDiagonal, PairedHessian
from calibrant.recipes.parts import (
    Budget,
    EndToEnd,
    OnText,
    Qat,
    Quadapter,
    Scheme,
    Transform,
    Zsaq,
)
from calibrant.strict import Strict

DEFAULT_RECIPE = "gptq-w4a16"
# Groups tried, largest first, when a recipe leaves the size to the model (ours).
AUTOMATIC_GROUP_SIZES = (128, 64, 32)


_WITH_DATA: dict[RangeSearch, Statistic | None] = {
    "none": None,
    "mse": None,
    "importance": HessianDiagonal,
    "clip": Hessian,
}


def _known_options(value: object) -> object:
    """The options of the method that ``value`` names, checked by the method."""
    if isinstance(value, MethodOptions):
        return value
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError("expected the method's name and options: {name: gptq}")
    name = value["name"]
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    try:
        return METHODS[name].options.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {_said(first)}") from None


class Recipe(Strict):
    """A named compression: ``transforms`` in order, then ``method``; or ``training``, which rounds to nearest itself.

    ``drift_correction`` fits every layer to what the original model computes from its own inputs, instead of to what the
    layer would make of the compressed model's; between 0 (not at all) and 1 it makes up for that share of the drift.
    With a ``budget`` the scheme's bits or share hold on average. ``ignore`` holds regular expressions searched for in
    module names to leave alone.
    """

    name: str
    description: str
    method: Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_known_options)]
    scheme: Scheme
    transforms: list[Transform] = Field(default=[])
    training: Annotated[Qat | EndToEnd | Zsaq, Field(discriminator="name")] | None = None
    drift_correction: float = Field(default=0.0, ge=0, le=1)
    budget: Budget | None = None
    ignore: list[str] = Field(default=[])

    @field_validator("ignore")
    @classmethod
    def _expressions(cls, value: list[str]) -> list[str]:
        for expression in value:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"ignore: {expression!r} is not a regular expression ({error})") from error
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        name, entry, scheme = self.method.name, METHODS[self.method.name], self.scheme
        refusal = entry.refusal(scheme, by_layer=bool(self.ignore or self.budget))
        if refusal is not None:
            raise ValueError(refusal)
        if self.drift_correction and entry.statistic is not Hessian:
            raise ValueError(f"asymmetric needs the inputs' second moments, which {name} does not gather")
        if self.transforms and scheme.weights is None:
            raise ValueError("transforms prepare for quantization: the scheme needs weights")
        if any(isinstance(transform, Quadapter) for transform in self.transforms) and len(self.transforms) > 1:
            raise ValueError("quadapter learns on the model as it is: leave other transforms out")
        if scheme.activations is not None and self.stored_dense:
            raise ValueError(f"{name} gives no integers of weights, without which int8 activations are not stored")
        return self

    @model_validator(mode="after")
    def _trainable(self) -> "Recipe":
        if self.training is None:
            return self
        weights, activations = self.scheme.weights, self.scheme.activations
        if self.method.name != "rtn" or weights is None or weights.range_search not in ("none", "mse"):
            raise ValueError("training ends with method rtn, and range_search none or mse")
        end_to_end = isinstance(self.training, EndToEnd)
        if end_to_end and not any(isinstance(transform, Quadapter) for transform in self.transforms):
            raise ValueError("quadapter's training goes on from the transform quadapter: add it to transforms")
        if end_to_end and (weights.range_search != "none" or self.training.sam_rho):
            raise ValueError("quadapter's training knows no range_search and no radius")
        if (self.transforms and not end_to_end) or self.drift_correction or self.budget:
            raise ValueError("training goes without transforms, asymmetric and budget")
        if activations is not None and not activations.dynamic:
            if isinstance(self.training, Zsaq):
                raise ValueError("zsaq has no data to choose static ranges from: leave dynamic: false out")
            if activations.range != "minmax":
                raise ValueError("training learns static ranges from the minimum and maximum: leave range out")
        return self

    @model_validator(mode="after")
    def _affordable(self) -> "Recipe":
        if self.budget is None:
            return self
        choices, weights = self.budget.choices, self.scheme.weights
        if self.scheme.activations is not None or (weights is not None and self.scheme.sparsity is not None):
            raise ValueError("a budget is of bits or of zeros, not of both, and not for int8 activations")
        if weights is not None and not weights.symmetric:
            raise ValueError("a budget of bits needs symmetric weights: transformers loads no others of mixed widths")
        if weights is not None and any(choice not in STORED_WIDTHS for choice in choices):
            raise ValueError(f"budget.choices: widths that files have, of {', '.join(map(str, STORED_WIDTHS))}")
        if weights is None and (":" in str(self.scheme.sparsity) or not all(0 <= choice < 1 for choice in choices)):
            raise ValueError("budget.choices: shares of zeros from 0 to below 1, and no pattern n:m")
        average = self.budget.average
        if average is None:
            average = weights.bits if weights is not None else float(str(self.scheme.sparsity))
        if len(set(choices)) < len(choices):
            raise ValueError(f"budget.choices: {choices} name one twice")
        if not min(choices) <= average <= max(choices):
            raise ValueError(f"budget: {choices} cannot average {average:g}; take others")
        return self

    @property
    def statistic(self) -> Statistic | None:
        """What must be gathered of a layer's inputs: the larger of what the method and the search of ranges need."""
        if self.drift_correction:
            return PairedHessian
        weights = self.scheme.weights
        needed = (METHODS[self.method.name].statistic, _WITH_DATA[weights.range_search] if weights else None)
        return Hessian if Hessian in needed else HessianDiagonal if HessianDiagonal in needed else None

    @property
    def stored_dense(self) -> bool:
        """Whether the result fits no quantized format, so that its values are stored as they are."""
        return METHODS[self.method.name].stored_dense(self.method)

    @property
    def solves_with_data(self) -> bool:
        """Whether layers are solved on what their inputs show."""
        if self.training is not None:
            return False
        activations = self.scheme.activations
        return self.statistic is not None or (activations is not None and not activations.dynamic)

    @property
    def learns(self) -> bool:
        """Whether something is trained before layers are solved."""
        return self.training is not None or any(isinstance(transform, Quadapter) for transform in self.transforms)

    @property
    def gathers(self) -> bool:
        """Whether the calibration set runs through the blocks while they are compressed."""
        return self.solves_with_data or any(not isinstance(transform, Quadapter) for transform in self.transforms)

    @property
    def needs_data(self) -> bool:
        """Whether a calibration set is used."""
        return self.gathers or bool(self.transforms) or self.budget is not None or isinstance(self.training, OnText)

    def ignores(self, name: str) -> bool:
        """Whether the layer of that full name is left alone; of a parameter, also by its module's name."""
        return any(
            re.search(expression, text) for expression in self.ignore for text in (name, name.rpartition(".")[0])
        )

    def as_written(self, exclude_none: bool = False) -> dict[str, Any]:
        """With all defaults, as a file would have it, but for a training's seed that nobody said."""
        found = self.model_dump(exclude_none=exclude_none)
        if self.training is not None and "seed" not in self.training.model_fields_set:
            del found["training"]["seed"]
        return found

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe with that seed of its training, if there is one that says none itself.

        Raises:
            CalibrantError: it is negative.
        """
        if self.training is None or "seed" in self.training.model_fields_set:
            return self
        if seed < 0:
            raise CalibrantError(f"seed {seed}: must be 0 or more")
        return self.model_copy(update={"training": self.training.model_copy(update={"seed": seed})})

    def with_weights(self, bits: int | None, group_size: int | None) -> "Recipe":
        """The same recipe with other bits or another group size (0: one scale a channel).

        Raises:
            CalibrantError: the recipe does not quantize, or the values do not fit it.
        """
        if bits is None and group_size is None:
            return self
        if self.scheme.weights is None:
            raise CalibrantError(f"recipe {self.name}: it does not quantize, so --bits and --group-size do not apply")
        changed = self.as_written()
        said = []
        if bits is not None:
            changed["scheme"]["weights"]["bits"] = bits
            said.append(f"{bits} bits")
        if group_size is not None:
            changed["scheme"]["weights"]["group_size"] = group_size or None
            said.append(f"groups of {group_size}" if group_size else "one scale a channel")
        changed["description"] += f"; changed to {' and '.join(said)}"
        return _validate(changed, f"recipe {self.name} with --bits or --group-size")


def builtin_recipes() -> dict[str, Recipe]:
    """The recipes that come with the package, by name."""
    folder = resources.files("calibrant.recipes") / "builtin"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    recipes = [_parse(entry.read_text(encoding="utf-8"), entry.name) for entry in files]
    return {recipe.name: recipe for recipe in recipes}


def load_recipe(name: str | Path) -> Recipe:
    """A built-in recipe by name, or a YAML file by path.

    Raises:
        CalibrantError: there is no such recipe or file, or a key or value in it is wrong; the message names it.
    """
    recipes = builtin_recipes()
    if str(name) in recipes:
        return recipes[str(name)]
    path = Path(name)
    if path.is_file():
        try:
            return _parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrantError(f"{path}: cannot be read ({error})") from error
    raise CalibrantError(f"{name}: no recipe of that name and no such file; there are {', '.join(recipes)}")


def _parse(text: str, origin: str) -> Recipe:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CalibrantError(f"{origin}: not YAML ({' '.join(str(error).split())})") from error
    return _validate(value, origin)


def _validate(value: object, origin: str) -> Recipe:
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        # A key that is not known explains one that is missing.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = ".".join(str(part) for part in first["loc"]) or "the recipe"
        said = _said(first)
        if first["type"] == "model_type":
            said = "expected keys name, description, method, scheme (calibrant recipes NAME shows an example)"
        raise CalibrantError(f"{origin}: {place}: {said}") from error


def _said(problem: Mapping[str, Any]) -> str:
    """Pydantic's message of one problem, in our words where they are clearer."""
    if problem["type"] == "extra_forbidden":
        return "no such key"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"expected a name, of {problem['ctx'].get('expected_tags', 'those that calibrant recipes NAME shows')}"
    return str(problem["msg"]).removeprefix("Value error, ")
