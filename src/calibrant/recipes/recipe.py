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
from calibrant.methods.method import MethodOptions, Statistic
from calibrant.methods.registry import METHODS, Method
from calibrant.methods.training import Trainer, TrainingOptions
from calibrant.quantization.grids import RangeSearch
from calibrant.quantization.statistics import Hessian, HessianDiagonal, PairedHessian
from calibrant.recipes.parts import Budget, Quadapter, Scheme, Transform
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
    """A named compression: ``transforms`` in order, then ``method``, onto ``scheme``.

    ``drift_correction``, a share from 0 to 1, fits every layer to what the original model computes from its own inputs
    instead of to the layer's outputs on the compressed model's inputs. With a ``budget``, the scheme's bits or share
    hold on average. ``ignore`` lists regular expressions that are searched for in module names; these layers are left
    alone.
    """

    name: str
    description: str
    method: Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_known_options)]
    scheme: Scheme
    transforms: list[Transform] = Field(default=[])
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
        """What goes together, in one place: the method's own rules, then those about the recipe's other parts."""
        kind, scheme = self.kind, self.scheme
        refusals = (
            kind.refusal(scheme, by_layer=bool(self.ignore or self.budget)),
            self._drift_refusal(),
            self._transforms_refusal(),
            self.budget.refusal(scheme) if self.budget is not None else None,
        )
        for refusal in refusals:
            if refusal is not None:
                raise ValueError(refusal)
        if scheme.activations is not None and self.stored_dense:
            name = self.method.name
            raise ValueError(f"{name} gives no integers of weights, without which int8 activations are not stored")
        return self

    def _drift_refusal(self) -> str | None:
        if self.drift_correction and self.kind.statistic is not Hessian:
            return f"drift_correction needs the inputs' Hessian, which {self.method.name} does not gather"
        return None

    def _transforms_refusal(self) -> str | None:
        kind, name = self.kind, self.method.name
        if self.transforms and self.scheme.weights is None:
            return "transforms prepare for quantization: the scheme needs weights"
        if self.quadapter is not None and len(self.transforms) > 1:
            return "quadapter learns on the model as it is: leave other transforms out"
        if isinstance(kind, Trainer):
            if kind.continues_quadapter and self.quadapter is None:
                return "the method quadapter goes on from the transform quadapter: add it to transforms"
            if (self.transforms and not kind.continues_quadapter) or self.budget is not None:
                return f"{name} trains the model as it is: leave transforms and budget out"
        return None

    @property
    def kind(self) -> Method:
        """The registry's entry of the method."""
        return METHODS[self.method.name]

    @property
    def changes_shape(self) -> bool:
        """Whether the method changes the shapes of the model."""
        return self.kind.changes_shape

    @property
    def training(self) -> TrainingOptions | None:
        """The method's options if it trains, else None."""
        return self.method if isinstance(self.method, TrainingOptions) else None

    @property
    def quadapter(self) -> Quadapter | None:
        """The transform whose scales are learned before layers are solved, if the recipe has it."""
        return next((transform for transform in self.transforms if isinstance(transform, Quadapter)), None)

    @property
    def statistic(self) -> Statistic | None:
        """What must be gathered of a layer's inputs: the larger of what the method and the range search need."""
        if self.drift_correction:
            return PairedHessian
        weights = self.scheme.weights
        needed = (self.kind.statistic, _WITH_DATA[weights.range_search] if weights else None)
        return Hessian if Hessian in needed else HessianDiagonal if HessianDiagonal in needed else None

    @property
    def stored_dense(self) -> bool:
        """Whether the result fits no quantized format, so that its values are stored as they are."""
        return self.kind.stored_dense(self.method)

    @property
    def solves_with_data(self) -> bool:
        """Whether layers are solved with statistics of their inputs."""
        if self.training is not None:
            return False
        activations = self.scheme.activations
        return self.statistic is not None or (activations is not None and not activations.dynamic)

    @property
    def learns(self) -> bool:
        """Whether something is trained before layers are solved."""
        return self.training is not None or self.quadapter is not None

    @property
    def gathers(self) -> bool:
        """Whether the calibration set runs through the blocks while they are compressed."""
        return self.solves_with_data or (bool(self.transforms) and self.quadapter is None)

    @property
    def needs_data(self) -> bool:
        """Whether a calibration set is used."""
        trains_on_data = isinstance(self.kind, Trainer) and self.kind.needs_data
        return self.gathers or bool(self.transforms) or self.budget is not None or trains_on_data

    def ignores(self, name: str) -> bool:
        """Whether the layer of that full name is left alone; of a parameter, also by its module's name."""
        return any(
            re.search(expression, text) for expression in self.ignore for text in (name, name.rpartition(".")[0])
        )

    def as_written(self, exclude_none: bool = False) -> dict[str, Any]:
        """With all defaults, as a file would have it; without the seed of a training that names none."""
        found = self.model_dump(exclude_none=exclude_none)
        if self.training is not None and "seed" not in self.training.model_fields_set:
            del found["method"]["seed"]
        return found

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe with ``seed`` for its training, if it trains and names no seed itself.

        Raises:
            CalibrantError: it is negative.
        """
        if self.training is None or "seed" in self.training.model_fields_set:
            return self
        if seed < 0:
            raise CalibrantError(f"seed {seed}: must be 0 or more")
        return self.model_copy(update={"method": self.training.model_copy(update={"seed": seed})})

    def with_weights(self, bits: int | None, group_size: int | None) -> "Recipe":
        """The same recipe with other bits or another group size (0: one scale a channel).

        Raises:
            CalibrantError: the recipe does not quantize, or the values do not fit it.
        """
        if bits is None and group_size is None:
            return self
        if self.scheme.weights is None:
            raise CalibrantError(f"recipe {self.name}: it does not quantize, so `bits` and `group_size` do not apply")
        changed = self.as_written()
        said = []
        if bits is not None:
            changed["scheme"]["weights"]["bits"] = bits
            said.append(f"{bits} bits")
        if group_size is not None:
            changed["scheme"]["weights"]["group_size"] = group_size or None
            said.append(f"groups of {group_size}" if group_size else "one scale a channel")
        changed["description"] += f"; changed to {' and '.join(said)}"
        return _validate(changed, f"recipe {self.name} with other `bits` or `group_size`")


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
