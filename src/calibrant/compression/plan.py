"""What a run will do, checked before any weight is read."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from calibrant.compression.activation_ranges import InputGrid
from calibrant.compression.grids import Grid, GridSpec
from calibrant.compression.methods import METHODS
from calibrant.compression.recipe import AUTOMATIC_GROUP_SIZES, Recipe
from calibrant.compression.recipe_parts import Quadapter
from calibrant.compression.solvers.sparsity import Sparsity
from calibrant.errors import CalibrantError
from calibrant.formats.input_rounding import INPUT_ROUNDING
from calibrant.formats.quantized import FormatName, Layout
from calibrant.formats.registry import format_for
from calibrant.modeling.lazy_model import LazyModel


@dataclass(frozen=True)
class TrainedLinear:
    """A linear after training: its weight ``[out, in]`` (float32), to be rounded on ``grid``."""

    weight: torch.Tensor
    grid: Grid


@dataclass(frozen=True)
class Plan:
    """A recipe made fit for a model.

    ``layout`` is None for models that are stored dense. ``linears`` maps the names of the plain linears to be
    compressed to ``(out, in)``; ``fused`` names parameters that hold many experts. ``notes`` are for the user.
    ``choices`` holds the bits or shares of zeros of linears for which a budget chose others than the scheme's,
    ``scales`` what was learned before the run for the columns behind a norm, by the first linear's full name,
    ``trained`` weights and grids that were learned, ``input_grids`` those of static inputs, by the linear's full name.
    """

    recipe: Recipe
    blocks: list[str]
    linears: dict[str, tuple[int, int]]
    fused: dict[str, tuple[int, ...]]
    spec: GridSpec | None
    sparsity: Sparsity | None
    layout: Layout | None
    notes: list[str]
    choices: dict[str, float] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] | None = None
    trained: dict[str, TrainedLinear] | None = None
    input_grids: dict[str, InputGrid] | None = None

    @property
    def nominal(self) -> float:
        """The scheme's bits, or its share of zeros."""
        return self.spec.bits if self.spec is not None else self.sparsity.share if self.sparsity is not None else 0.0

    @property
    def value_dtype(self) -> torch.dtype:
        """What holds rounded values: float32 where they are computed from codes, else the model's own dtype."""
        return torch.float32 if self.layout is not None or self.spec is None else self.spec.scale_dtype

    def spec_for(self, name: str) -> GridSpec | None:
        """The grid of the linear of that full name."""
        if self.spec is None or name not in self.choices:
            return self.spec
        return replace(self.spec, bits=int(self.choices[name]))

    def sparsity_for(self, name: str) -> Sparsity | None:
        """What is pruned of the linear of that full name."""
        return Sparsity(self.choices[name]) if self.spec is None and name in self.choices else self.sparsity

    def layout_for(self, name: str) -> Layout | None:
        """How the linear of that full name is stored."""
        if self.layout is None or name not in self.choices:
            return self.layout
        return replace(self.layout, bits=int(self.choices[name]))

    def ignored(self, name: str) -> bool:
        """Whether the recipe leaves the linear of that full name alone; for experts also by their module's name."""
        return _ignored(self.recipe, name)


def make_plan(
    model: LazyModel, blocks: list[str], chosen: Recipe, format_name: FormatName = "compressed-tensors"
) -> Plan:
    """Fit the ``chosen`` recipe to ``model``, stored in the format of that name.

    Raises:
        CalibrantError: a group or pattern does not divide a layer (with the sizes that do), nothing is left to
            compress, or the model's layers cannot be stored as the scheme wants.
    """
    linears: dict[str, tuple[int, int]] = {}
    fused: dict[str, tuple[int, ...]] = {}
    stored_otherwise: list[str] = []
    for name, module in model.module.named_modules():
        if not any(name.startswith(block + ".") for block in blocks):
            continue
        if isinstance(module, nn.Linear | Conv1D) and _ignored(chosen, name):
            continue
        if isinstance(module, nn.Linear):
            linears[name] = (module.out_features, module.in_features)
            # Subclasses (FalconLinear) are refused by the loaders of quantized formats.
            if type(module) is not nn.Linear or not model.is_stored_alone(f"{name}.weight"):
                stored_otherwise.append(name)
        elif isinstance(module, Conv1D):
            linears[name] = (module.weight.shape[1], module.weight.shape[0])
            stored_otherwise.append(name)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and not _ignored(chosen, f"{name}.{parameter_name}"):
                fused[f"{name}.{parameter_name}"] = tuple(parameter.shape)
                stored_otherwise.append(f"{name}.{parameter_name}")
    _check_ignored(model, chosen)
    if not linears and not fused:
        raise CalibrantError("nothing to compress: the recipe's ignore list covers every linear layer")
    recipe = _fit_groups(chosen, linears, fused)
    _check_pattern(recipe, linears, fused)
    if fused and any(isinstance(transform, Quadapter) for transform in recipe.transforms):
        raise CalibrantError(f"{next(iter(fused))}: fused experts, which quadapter learns no scales for; ignore them")
    if fused and recipe.training is not None:
        raise CalibrantError(
            f"{next(iter(fused))}: fused experts, which {recipe.training.name} cannot train; ignore them"
        )
    if fused and (recipe.asymmetric or recipe.budget is not None):
        what = "beside which the original model cannot run" if recipe.asymmetric else "which a budget cannot measure"
        raise CalibrantError(f"{next(iter(fused))}: fused experts, {what}; take a recipe without that")
    weights, notes = recipe.scheme.weights, []
    spec = layout = None
    asked = chosen.scheme.weights.group_size if chosen.scheme.weights is not None else None
    if asked == "auto":
        fitted = recipe.scheme.weights.group_size if recipe.scheme.weights is not None else None
        notes.append(f"groups of {fitted}" if fitted else "no group size fits every layer: one scale a channel")
    if weights is not None:
        group = weights.group_size if isinstance(weights.group_size, int) else None
        scale_dtype = model.folder.dtype if format_name == "compressed-tensors" else torch.float16
        spec = GridSpec(weights.bits, weights.symmetric, group, scale_dtype, weights.range_search)
        layout = Layout(weights.bits, weights.symmetric, group, _activations(recipe), format_name)
        if format_name != "compressed-tensors":
            _check_format(layout, linears, stored_otherwise, recipe)
        if recipe.budget is not None and (
            stored_otherwise or recipe.stored_dense or format_name != "compressed-tensors"
        ):
            raise CalibrantError("a budget of bits needs layers that compressed-tensors can hold packed")
        if fused and layout.activations:
            raise CalibrantError(
                f"{next(iter(fused))}: fused experts, which int8 activations do not go with; ignore them, "
                "or take a weight-only recipe"
            )
        if recipe.stored_dense:
            notes.append(f"{recipe.method.name} fits no quantized format: its values are stored dense")
            layout = None
        elif stored_otherwise:
            notes.append(
                f"{stored_otherwise[0]} is not an ordinary linear layer, which no quantized format that transformers "
                "loads can hold: the quantized values are stored dense, so the files do not get smaller"
            )
            if layout.activations:
                notes.append(
                    f"its int8 inputs are described in {INPUT_ROUNDING}, which calibrant evaluate computes with; "
                    "loaders of others see the rounded weights alone"
                )
            layout = None
        elif not layout.symmetric and not layout.activations and format_name == "compressed-tensors":
            notes.append(
                "transformers 5.23 loads asymmetric packed weights only unpacked: pass from_pretrained "
                "quantization_config=CompressedTensorsConfig(dequantize=True)"
            )
        elif layout.activations and layout.bits < 8:
            notes.append(
                f"{layout.bits}-bit weights beside int8 activations are stored as int8 tensors, as engines read them: "
                "the files are as large as those of 8 bits"
            )
        elif layout.stored_bits != layout.bits:
            notes.append(
                f"{layout.bits}-bit values are stored in {layout.stored_bits} bits, which every loader reads alike"
            )
    elif format_name != "compressed-tensors":
        raise CalibrantError(f"pruned models are stored dense: leave out the {format_name} format")
    else:
        if not METHODS[recipe.method.name].structured:
            notes.append("pruned weights are stored dense: the zeros are there, the files do not get smaller")
    return Plan(recipe, blocks, linears, fused, spec, _sparsity(recipe), layout, notes)


def _activations(recipe: Recipe) -> Literal["dynamic", "static"] | None:
    activations = recipe.scheme.activations
    return None if activations is None else "dynamic" if activations.dynamic else "static"


def _check_format(
    layout: Layout, linears: dict[str, tuple[int, int]], stored_otherwise: list[str], recipe: Recipe
) -> None:
    """Refuse what the asked format cannot hold.

    Raises:
        CalibrantError: the scheme, the method or a layer does not fit.
    """
    refusal = format_for(layout).refusal(layout)
    if layout.activations:
        refusal = f"the {layout.format} format is for weights alone: take compressed-tensors for int8 activations"
    if recipe.stored_dense or stored_otherwise:
        what = recipe.method.name if recipe.stored_dense else f"{stored_otherwise[0]} is no ordinary linear layer and"
        refusal = f"{what} fits no {layout.format} checkpoint: take compressed-tensors"
    words = 32 // layout.stored_bits
    for name, shape in linears.items():
        if any(size % words for size in shape):
            refusal = refusal or f"{name}: the {layout.format} format needs sizes that {words} divides, it has {shape}"
    if refusal:
        raise CalibrantError(refusal)


def _ignored(recipe: Recipe, name: str) -> bool:
    return any(re.search(expression, text) for expression in recipe.ignore for text in (name, name.rpartition(".")[0]))


def _check_ignored(model: LazyModel, recipe: Recipe) -> None:
    """Refuse an expression that finds nothing: a slip in it would compress what was to be left alone."""
    modules = [name for name, _ in model.module.named_modules() if name]
    names = modules + [name for name, parameter in model.module.named_parameters() if parameter.ndim == 3]
    for expression in recipe.ignore:
        if not any(re.search(expression, name) for name in names):
            raise CalibrantError(f"ignore: {expression!r} is in no module's name; this model has, say, {modules[-1]}")


def _sparsity(recipe: Recipe) -> Sparsity | None:
    text = recipe.scheme.sparsity
    if text is None:
        return None
    if ":" in text:
        kept, of = text.split(":")
        return Sparsity.n_of_m(int(kept), int(of))
    return Sparsity(float(text))


def _inputs(linears: dict[str, tuple[int, int]], fused: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Input width of every layer; for fused experts the orientation is unknown yet, so both axes are listed."""
    widths = {name: shape[1] for name, shape in linears.items()}
    for name, shape in fused.items():
        widths[name] = shape[2]
        widths[f"{name} (other axis)"] = shape[1]
    return widths


def _fit_groups(recipe: Recipe, linears: dict[str, tuple[int, int]], fused: dict[str, tuple[int, ...]]) -> Recipe:
    weights = recipe.scheme.weights
    if weights is None or weights.group_size is None:
        return recipe
    widths = _inputs(linears, fused)
    if weights.group_size == "auto":
        fitting = [size for size in AUTOMATIC_GROUP_SIZES if all(width % size == 0 for width in widths.values())]
        return recipe.with_weights(None, fitting[0] if fitting else 0)
    wrong = {name: width for name, width in widths.items() if width % int(weights.group_size)}
    if not wrong:
        return recipe
    name, width = next(iter(wrong.items()))
    powers = [size for size in (256, 128, 64, 32, 16, 8) if all(w % size == 0 for w in widths.values())]
    fits = ", ".join(map(str, powers)) if powers else "none"
    raise CalibrantError(
        f"group size {weights.group_size} does not divide the {width} inputs of {name} "
        f"(and {len(wrong) - 1} more layers); "
        f"sizes that fit every layer: {fits}; --group-size 0 takes one scale a channel"
    )


def _check_pattern(recipe: Recipe, linears: dict[str, tuple[int, int]], fused: dict[str, tuple[int, ...]]) -> None:
    sparsity = _sparsity(recipe)
    if sparsity is None or not sparsity.structured:
        return
    for name, width in _inputs(linears, fused).items():
        if width % sparsity.of:
            raise CalibrantError(
                f"pattern {recipe.scheme.sparsity} does not divide the {width} inputs of {name}; "
                "leave the layer out with ignore, or take a share such as 0.5"
            )
