"""Recipes: a method, a scheme and the layers to compress; named, validated, read from YAML."""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from calibrant.errors import CalibrantError
from calibrant.methods.method import LayerSolver, MethodOptions, Statistic
from calibrant.methods.registry import METHODS, Method
from calibrant.methods.training import Trainer, TrainingOptions
from calibrant.quantization.grids import RangeSearch
from calibrant.quantization.statistics import Hessian, HessianDiagonal, PairedHessian
from calibrant.recipes.expressions import MOST_EXPRESSIONS, Expressions, check_expression
from calibrant.recipes.parts import Budget, Distillation, Quadapter, Reconstruction, Scheme, StarvedExperts, Transform
from calibrant.strict import Strict
from calibrant.yaml_file import parse_yaml, read_yaml_file

DEFAULT_RECIPE = "gptq-w4a16"
# Group sizes that ``group_size: auto`` tries, largest first (ours).
AUTOMATIC_GROUP_SIZES = (128, 64, 32)


_WITH_DATA: dict[RangeSearch, Statistic | None] = {
    "none": None,
    "mse": None,
    "four-over-six": None,
    "importance": HessianDiagonal,
    "clip": Hessian,
}


def _known_options(value: object) -> object:
    """Options of the method that ``value`` names, validated by the method's model."""
    if isinstance(value, MethodOptions):
        if value.name not in METHODS:
            raise ValueError(f"no method {value.name!r}; there are {', '.join(METHODS)}")
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
    """A named compression: ``transforms`` in order, then ``method``, with ``scheme`` as the target.

    ``drift_correction``, from 0 to 1, interpolates every layer's target between the original layer's outputs on the
    compressed model's inputs (0) and on the original model's inputs (1). With a ``budget``, the scheme's bits or share
    of zeros are an average. ``reconstruction`` trains what each solved block holds as floating-point numbers,
    ``distillation`` then what all of them hold.
    ``experts`` is for experts of a mixture that few tokens reach.
    ``ignore`` lists regular expressions; layers whose names contain a match are left alone.
    """

    name: str
    description: str
    method: Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_known_options)]
    scheme: Scheme
    transforms: list[Transform] = Field(default=[], max_length=10)
    drift_correction: float = Field(default=0.0, ge=0, le=1)
    reconstruction: Reconstruction | None = None
    distillation: Distillation | None = None
    budget: Budget | None = None
    experts: StarvedExperts | None = None
    ignore: list[str] = Field(default=[], max_length=MOST_EXPRESSIONS)
    _origin: str | None = PrivateAttr(default=None)

    @field_validator("ignore")
    @classmethod
    def _expressions(cls, value: list[str]) -> list[str]:
        for expression in value:
            check_expression(expression)
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        """Refuse parts that do not fit each other: the method's rules first, then those between other parts."""
        kind, scheme = self.kind, self.scheme
        refusals = (
            kind.refusal(scheme, by_layer=bool(self.ignore or self.budget)),
            self.method.refusal(scheme),
            self._drift_refusal(),
            self._learning_refusal("reconstruction", self.reconstruction),
            self._learning_refusal("distillation", self.distillation),
            self._transforms_refusal(),
            self.budget.refusal(scheme) if self.budget is not None else None,
            self._experts_refusal(),
        )
        for refusal in refusals:
            if refusal is not None:
                raise ValueError(refusal)
        if scheme.activations is not None and self.stored_dense:
            name = self.method.name
            raise ValueError(f"{name} gives no codes of weights, without which quantized activations are not stored")
        if scheme.kv_cache is not None and (self.stored_dense or self.training is not None):
            what = "trains the model" if self.training is not None else "gives no codes of weights"
            raise ValueError(f"{self.method.name} {what}, beside which no kv_cache is quantized: take another method")
        return self

    def _drift_refusal(self) -> str | None:
        if self.drift_correction and self.kind.statistic is not Hessian:
            return f"drift_correction needs the inputs' Hessian, which {self.method.name} does not gather"
        return None

    def _learning_refusal(self, key: str, asked: Reconstruction | Distillation | None) -> str | None:
        scheme, name = self.scheme, self.method.name
        if asked is None:
            return None
        if not isinstance(self.kind, LayerSolver) or self.stored_dense:
            return f"{key} trains scales and kept weights, of which {name} leaves none: leave it out"
        if scheme.activations is not None or (scheme.weights is not None and scheme.weights.type != "int"):
            return f"{key} is for integer weights and zeros, without quantized activations: leave it out"
        if scheme.kv_cache is not None and asked is self.distillation:
            return "distillation would change the keys and values that scales of kv_cache are from: leave one out"
        return None

    def _experts_refusal(self) -> str | None:
        if self.experts is not None and (self.statistic is None or self.changes_shape):
            return f"experts says what their statistics are from, and {self.method.name} gathers none: leave it out"
        return None

    def _transforms_refusal(self) -> str | None:
        kind, name = self.kind, self.method.name
        if self.transforms and self.scheme.weights is None:
            return "transforms prepare for quantization: the scheme needs weights"
        if self.quadapter is not None and len(self.transforms) > 1:
            return "quadapter learns on the model as it is: leave other transforms out"
        if self.quadapter is not None and self.scheme.weights is not None and self.scheme.weights.type != "int":
            return "quadapter learns for integers: leave the type of weights out"
        if isinstance(kind, Trainer):
            if kind.continues_quadapter and self.quadapter is None:
                return "the method quadapter continues from the transform quadapter: add it to transforms"
            if (self.transforms and not kind.continues_quadapter) or self.budget is not None:
                return f"{name} trains the model as it is: leave transforms and budget out"
        return None

    @property
    def kind(self) -> Method:
        """The method's entry in the registry."""
        return METHODS[self.method.name]

    @property
    def changes_shape(self) -> bool:
        """Whether the method changes the shapes of the model."""
        return self.kind.changes_shape

    @property
    def training(self) -> TrainingOptions | None:
        """The method's options if the method trains, otherwise None."""
        return self.method if isinstance(self.method, TrainingOptions) else None

    @property
    def quadapter(self) -> Quadapter | None:
        """The Quadapter transform, if the recipe has it; its scales are learned before layers are solved."""
        return next((transform for transform in self.transforms if isinstance(transform, Quadapter)), None)

    @property
    def beside_original(self) -> bool:
        """Whether every block of the original model runs beside the compressed one."""
        return self.drift_correction > 0 or self.reconstruction is not None

    @property
    def statistic(self) -> Statistic | None:
        """Statistic of a layer's inputs to gather: the larger of those that the method and the range search need."""
        if self.drift_correction:
            return PairedHessian
        weights = self.scheme.weights
        needed = (self.kind.statistic, _WITH_DATA[weights.range_search] if weights else None)
        return Hessian if Hessian in needed else HessianDiagonal if HessianDiagonal in needed else None

    @property
    def stored_dense(self) -> bool:
        """Whether no quantized format fits the result, so that its values are stored dense."""
        return self.kind.stored_dense(self.method)

    @property
    def solves_with_data(self) -> bool:
        """Whether layers are solved with statistics or ranges of their inputs, or keys and values are observed."""
        if self.training is not None:
            return False
        activations = self.scheme.activations
        observed = activations is not None and activations.observed
        cached = self.scheme.kv_cache is not None
        return self.statistic is not None or observed or cached or self.reconstruction is not None

    @property
    def learns(self) -> bool:
        """Whether the method or a transform is trained before layers are solved."""
        return self.training is not None or self.quadapter is not None

    @property
    def gathers(self) -> bool:
        """Whether the calibration set is run through the blocks during compression."""
        return self.solves_with_data or (bool(self.transforms) and self.quadapter is None)

    @property
    def needs_data(self) -> bool:
        """Whether the recipe uses a calibration set."""
        trains_on_data = isinstance(self.kind, Trainer) and self.kind.needs_data
        learns = trains_on_data or self.distillation is not None
        return self.gathers or bool(self.transforms) or self.budget is not None or learns

    def ignores(self, name: str) -> bool:
        """Whether the layer or parameter with full name ``name`` is ignored, by this name or its parent module's."""
        texts = (name, name.rpartition(".")[0])
        return any(self.matches(expression, text) for expression in self.ignore for text in texts)

    def matches(self, expression: str, text: str) -> bool:
        """Whether ``expression``, one of ``ignore``, matches somewhere in ``text``.

        Raises:
            CalibrantError: the recipe's expressions take too long to match.
        """
        return self._matcher.finds(expression, text)

    @cached_property
    def _matcher(self) -> Expressions:
        return Expressions(self.ignore, self._origin or f"recipe {self.name}")

    def as_written(self, exclude_none: bool = False) -> dict[str, Any]:
        """The recipe as a dict with all defaults, except a training's seed that the recipe does not set."""
        found = self.model_dump(exclude_none=exclude_none)
        if self.training is not None and "seed" not in self.training.model_fields_set:
            del found["method"]["seed"]
        return found

    def with_seed(self, seed: int) -> "Recipe":
        """The recipe with ``seed`` for its training or distillation, unless that sets a seed itself.

        Raises:
            CalibrantError: the seed is negative.
        """
        parts = {"method": self.training, "distillation": self.distillation}
        open_parts = {
            key: part for key, part in parts.items() if part is not None and "seed" not in part.model_fields_set
        }
        if open_parts and seed < 0:
            raise CalibrantError(f"seed {seed}: must be 0 or more")
        return self.model_copy(update={key: part.model_copy(update={"seed": seed}) for key, part in open_parts.items()})

    def with_weights(self, bits: int | None, group_size: int | None) -> "Recipe":
        """The recipe with other ``bits`` or another ``group_size`` (0: one scale per channel; None: unchanged).

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
            said.append(f"groups of {group_size}" if group_size else "one scale per channel")
        changed["description"] += f"; changed to {' and '.join(said)}"
        return self._changed(changed, "other `bits` or `group_size`")

    def with_type(self, kind: str, range_search: RangeSearch) -> "Recipe":
        """The recipe with weights of the type ``kind``.

        Raises:
            CalibrantError: the type does not fit the recipe.
        """
        changed = self.as_written()
        changed["scheme"]["weights"] = {"type": kind, "range_search": range_search}
        return self._changed(changed, f"weights of type {kind}")

    def _changed(self, fields: dict[str, Any], what: str) -> "Recipe":
        """The recipe of changed ``fields``; ``what`` is for messages."""
        found = _validate(fields, f"recipe {self.name} with {what}")
        found._origin = self._origin
        return found


def builtin_recipes() -> dict[str, Recipe]:
    """The recipes shipped with the package, by name."""
    return dict(_builtin_recipes())


@cache
def _builtin_recipes() -> dict[str, Recipe]:
    folder = resources.files("calibrant.recipes") / "builtin"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    recipes = [_parse(entry.read_text(encoding="utf-8"), entry.name) for entry in files]
    return {recipe.name: recipe for recipe in recipes}


def load_recipe(name: str | Path) -> Recipe:
    """Load a built-in recipe by name, or a YAML file by path.

    Raises:
        CalibrantError: there is no such recipe or file, or a key or value in the file is wrong; the message names the
            key.
    """
    recipes = _builtin_recipes()
    if str(name) in recipes:
        return recipes[str(name)]
    path = Path(name)
    if path.is_file():
        return _parse(read_yaml_file(path, "recipe"), str(path))
    if path.suffix in (".yaml", ".yml"):
        raise CalibrantError(f"{name}: no such file; built-in recipes have no suffix (`calibrant recipes` lists them)")
    near = get_close_matches(str(name), recipes, n=3)
    hint = f"near it are {', '.join(near)}; " if near else ""
    raise CalibrantError(f"{name}: no recipe of that name and no such file; {hint}`calibrant recipes` lists all")


def _parse(text: str, origin: str) -> Recipe:
    recipe = _validate(parse_yaml(text, origin, "recipe"), origin)
    recipe._origin = origin
    return recipe


def _validate(value: object, origin: str) -> Recipe:
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        # Unknown keys first: a misspelled key also shows up as a missing one.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = ".".join(str(part) for part in first["loc"]) or "the recipe"
        said = _said(first)
        if first["type"] == "model_type":
            said = "expected keys name, description, method, scheme (calibrant recipes NAME shows an example)"
        raise CalibrantError(f"{origin}: {place}: {said}") from error


def _said(problem: Mapping[str, Any]) -> str:
    """Pydantic's message for one problem, replaced where ours is clearer."""
    if problem["type"] == "extra_forbidden":
        return "no such key"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"expected a name, of {problem['ctx'].get('expected_tags', 'those that calibrant recipes NAME shows')}"
    return str(problem["msg"]).removeprefix("Value error, ")
