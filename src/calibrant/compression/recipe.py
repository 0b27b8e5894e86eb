"""Recipes: which method, onto which scheme, for which layers; validated, named, readable as YAML."""

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from calibrant.compression.grids import RangeSearch
from calibrant.errors import CalibrantError

DEFAULT_RECIPE = "gptq-w4a16"
# Groups tried, largest first, when a recipe leaves the size to the model (ours).
AUTOMATIC_GROUP_SIZES = (128, 64, 32)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Strict):
    """Weight quantization.

    ``group_size`` None is one scale an output channel, "auto" the largest of 128, 64, 32 that fits. ``range_search``:
    "mse" needs no data, "importance" and "clip" look at the layer's inputs.
    """

    bits: int = Field(ge=2, le=8)
    symmetric: bool = True
    group_size: int | Literal["auto"] | None = None
    range_search: RangeSearch = "none"

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("group_size must be at least 1 (leave it out for one scale a channel)")
        return value


class Activations(_Strict):
    """Activation quantization at run time: symmetric int8 with one scale a token, found on the fly."""

    bits: Literal[8] = 8
    dynamic: Literal[True] = True


class Scheme(_Strict):
    """The target; ``sparsity`` is a share ("0.5") or a pattern ("2:4", two of every four kept)."""

    weights: Weights | None = None
    activations: Activations | None = None
    sparsity: str | None = None

    @field_validator("sparsity", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> str | None:
        if value is None:
            return None
        text = str(value)
        pattern = re.fullmatch(r"(\d+):(\d+)", text)
        if pattern and 0 < int(pattern[1]) < int(pattern[2]) <= 32:
            return text
        if not pattern and re.fullmatch(r"0?\.\d+", text) and 0 < float(text) < 1:
            return text
        raise ValueError(
            f'{text} is neither a share between 0 and 1 nor a pattern n:m with 0 < n < m <= 32 (in quotes: "2:4")'
        )

    @model_validator(mode="after")
    def _something(self) -> "Scheme":
        if self.weights is None and self.sparsity is None:
            raise ValueError("a scheme needs weights, a sparsity or both")
        if self.activations is not None and (self.weights is None or self.weights.bits != 8):
            raise ValueError("int8 activations go with 8-bit weights only")
        if self.activations is not None and self.weights is not None and self.weights.group_size is not None:
            raise ValueError("int8 activations go with one weight scale a channel: leave group_size out")
        return self


class Rtn(_Strict):
    """Round-to-nearest; no data."""

    name: Literal["rtn"]


class Gptq(_Strict):
    """GPTQ; ``damping`` relative to the mean of the Hessian's diagonal; coordinate descent for ``refine_sweeps``."""

    name: Literal["gptq"]
    damping: float = Field(default=0.01, gt=0)
    act_order: bool = True
    refine_sweeps: int = Field(default=0, ge=0)


class QuantEase(_Strict):
    """QuantEase; with ``outliers`` that share of the weights stays exact and the result is stored dense."""

    name: Literal["quantease"]
    sweeps: int = Field(default=30, ge=1)
    outliers: float = Field(default=0.0, ge=0, lt=1)


class Spqr(_Strict):
    """SpQR, stored dense; ``statistic_bits`` of the quantized scales and zeros, None to keep them."""

    name: Literal["spqr"]
    threshold: float = Field(default=0.2, gt=0)
    damping: float = Field(default=1.0, gt=0)
    act_order: bool = True
    statistic_bits: int | None = Field(default=3, ge=1, le=8)
    integer_zero: bool = False


class Hqq(_Strict):
    """HQQ, stored dense; no data."""

    name: Literal["hqq"]


class Adpq(_Strict):
    """AdpQ, stored dense; no data. The ``share`` of largest weights gets grids of its own."""

    name: Literal["adpq"]
    share: float = Field(default=0.06, gt=0, lt=1)


class SparseGpt(_Strict):
    """SparseGPT; with weights in the scheme also quantizes."""

    name: Literal["sparsegpt"]
    damping: float = Field(default=0.01, gt=0)


class Wanda(_Strict):
    """Wanda."""

    name: Literal["wanda"]


class Magnitude(_Strict):
    """Magnitude pruning; no data."""

    name: Literal["magnitude"]


class SmoothQuant(_Strict):
    """SmoothQuant: scales from norms into linears; ``alpha`` 1 moves the activations' whole range."""

    name: Literal["smoothquant"]
    alpha: float = Field(default=0.5, ge=0, le=1)


class Awq(_Strict):
    """AWQ's channel scales, searched over ``steps`` powers; ``duo`` also divides by the weights' magnitude."""

    name: Literal["awq"]
    steps: int = Field(default=20, ge=1)
    duo: bool = False


Transform = Annotated[SmoothQuant | Awq, Field(discriminator="name")]
Method = Annotated[
    Rtn | Gptq | QuantEase | Spqr | Hqq | Adpq | SparseGpt | Wanda | Magnitude, Field(discriminator="name")
]
_PRUNES, _BOTH = {"wanda", "magnitude", "sparsegpt"}, {"sparsegpt"}
_SECOND_ORDER = {"gptq", "quantease", "spqr", "sparsegpt"}
_SYMMETRIC: dict[str, bool] = {"adpq": True, "spqr": False, "hqq": False}


class Recipe(_Strict):
    """A named compression: ``transforms`` in order, then ``method``.

    ``asymmetric`` fits every layer to what the original model computes from its own inputs, instead of to what the
    layer would make of the compressed model's. ``ignore`` holds regular expressions searched for in module names to
    leave alone.
    """

    name: str
    description: str
    method: Method
    scheme: Scheme
    transforms: list[Transform] = []
    asymmetric: bool = False
    ignore: list[str] = []

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
        method, scheme = self.method.name, self.scheme
        if method not in _PRUNES and (scheme.weights is None or scheme.sparsity is not None):
            raise ValueError(f"{method} quantizes: the scheme needs weights and no sparsity")
        if method in _PRUNES and scheme.sparsity is None:
            raise ValueError(f"{method} prunes: the scheme needs a sparsity")
        if method in _PRUNES - _BOTH and scheme.weights is not None:
            raise ValueError(f"{method} cannot quantize: take sparsegpt, or leave weights out")
        if scheme.weights is not None and method in _SYMMETRIC:
            if scheme.weights.symmetric != _SYMMETRIC[method]:
                raise ValueError(f"{method} needs weights with symmetric: {str(_SYMMETRIC[method]).lower()}")
            if scheme.weights.range_search != "none":
                raise ValueError(f"{method} fits its ranges itself: leave range_search out")
        if self.asymmetric and method not in _SECOND_ORDER:
            raise ValueError(f"asymmetric needs the inputs' second moments, which {method} does not gather")
        if self.transforms and scheme.weights is None:
            raise ValueError("transforms prepare for quantization: the scheme needs weights")
        if scheme.activations is not None and self.stored_dense:
            raise ValueError(f"{method} is stored dense, which no int8 activations go with")
        return self

    @property
    def stored_dense(self) -> bool:
        """Whether the result fits no quantized format, so that its values are stored as they are."""
        return self.method.name in ("spqr", "hqq", "adpq") or (
            self.method.name == "quantease" and self.method.outliers > 0
        )

    @property
    def needs_data(self) -> bool:
        """Whether the method uses a calibration set."""
        weights = self.scheme.weights
        searched = weights is not None and weights.range_search in ("importance", "clip")
        return searched or bool(self.transforms) or self.method.name not in ("rtn", "magnitude", "hqq", "adpq")

    def with_weights(self, bits: int | None, group_size: int | None) -> "Recipe":
        """The same recipe with other bits or another group size (0: one scale a channel).

        Raises:
            CalibrantError: the recipe does not quantize, or the values do not fit it.
        """
        if bits is None and group_size is None:
            return self
        if self.scheme.weights is None:
            raise CalibrantError(f"recipe {self.name}: it does not quantize, so --bits and --group-size do not apply")
        changed = self.model_dump()
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
    folder = resources.files("calibrant.compression") / "recipes"
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
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the recipe"
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = "no such key"
        if first["type"] == "model_type":
            said = "expected keys name, description, method, scheme (calibrant recipes NAME shows an example)"
        raise CalibrantError(f"{origin}: {place}: {said}") from error
