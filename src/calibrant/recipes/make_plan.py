"""Fits a recipe to a model, before any weight is read."""

from dataclasses import replace
from typing import Literal

import torch

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_types import GGUF_TYPES, SUPER_BLOCK, fitting_type
from calibrant.formats.quantized import BLOCK_SIZE, FormatName, Layout
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import fused_parameters
from calibrant.quantization.grids import MX_SCALE, NV_SCALE, GridSpec, RangeSearch
from calibrant.recipes.gguf_spec import gguf_spec
from calibrant.recipes.model_layers import ModelLayers, model_layers, weights_left
from calibrant.recipes.plan import Plan, Target
from calibrant.recipes.plan_checks import (
    check_bits_budget,
    check_blocks,
    check_carried,
    check_distillation,
    check_format,
    check_fused,
    check_ignored,
    check_kv_cache,
    check_pattern,
)
from calibrant.recipes.plan_head import head_plan
from calibrant.recipes.plan_notes import group_notes, head_notes, left_notes, storage_notes, with_share_note
from calibrant.recipes.recipe import AUTOMATIC_GROUP_SIZES, Recipe
from calibrant.wording import and_more

_SCALES = {"mxfp4": MX_SCALE, "nvfp4": NV_SCALE}
# Rows with one scale; None: all.
_SCALE_ROWS = {"channel": 1, "tensor": None, "block": BLOCK_SIZE}
_PRUNED_DENSE = "pruned weights are stored dense: the zeros are there, the files do not get smaller"


def make_plan(
    model: LazyModel, blocks: list[str], chosen: Recipe, format_name: FormatName = "compressed-tensors"
) -> Plan:
    """Fit the ``chosen`` recipe to ``model``, to be stored in the format ``format_name``.

    Raises:
        CalibrantError: a group size or pattern does not divide a layer's inputs (the message lists sizes that do),
            nothing is left to compress, or the format cannot store the scheme or a layer.
    """
    layers = model_layers(model, blocks, chosen)
    left = weights_left(model, blocks, layers)
    check_ignored(model, chosen)
    check_carried(model, blocks, chosen)
    of_left = left_notes(layers)
    if not layers.linears and not layers.fused:
        raise CalibrantError("nothing to compress: the recipe's ignore list covers every linear layer")
    if chosen.scheme.weights is not None:
        chosen, format_name = _as_gguf(chosen, format_name)
    if _is_native(model, layers, chosen):
        if format_name != "compressed-tensors":
            raise CalibrantError(f"GPT-OSS's experts in MXFP4 have a format of their own: leave out {format_name}")
        layers, format_name = layers.experts_alone(), "gpt-oss"
    recipe = _fit_groups(chosen, layers)
    check_blocks(recipe, layers)
    sparsity = _sparsity(recipe)
    check_pattern(recipe, sparsity, layers)
    check_fused(recipe, layers.fused)
    if recipe.experts is not None and not layers.fused:
        raise CalibrantError(f"{model.folder.path}: has no fused experts; leave `experts` out of the recipe")
    if recipe.scheme.weights is None:
        if format_name != "compressed-tensors":
            raise CalibrantError(f"pruned models are stored dense: leave out the {format_name} format")
        notes = of_left if recipe.changes_shape else [*of_left, _PRUNED_DENSE]
        target = Target(None, sparsity, None)
        plan = Plan(recipe, blocks, target, layers.planned(target), notes, left, left_alone=layers.left_alone)
        return with_share_note(plan)
    spec, layout = _grid_and_layout(model, recipe, format_name)
    check_format(layout, layers, recipe)
    check_bits_budget(layout, layers, recipe)
    check_distillation(recipe, layers)
    check_kv_cache(model, blocks, layout, layers, recipe)
    head = head_plan(model, layout, layers, recipe)
    notes = [*of_left, *group_notes(chosen, spec), *head_notes(head), *storage_notes(layout, layers, recipe)]
    stored = None if recipe.stored_dense or layers.unpackable else layout
    target = Target(spec, sparsity, stored)
    plan = Plan(recipe, blocks, target, layers.planned(target), notes, left, left_alone=layers.left_alone, head=head)
    return with_share_note(_with_fallbacks(plan))


def _as_gguf(recipe: Recipe, format_name: FormatName) -> tuple[Recipe, FormatName]:
    """llama.cpp's types imply the gguf format; in that format, integers become the type that has them.

    Raises:
        CalibrantError: no type has these integers, or another format was asked for.
    """
    weights = recipe.scheme.weights
    assert weights is not None
    if weights.gguf is not None:
        if format_name not in ("compressed-tensors", "gguf"):
            raise CalibrantError(f"{weights.type} is a type of GGUF files: leave out the {format_name} format")
        return recipe, "gguf"
    if format_name != "gguf":
        return recipe, format_name
    if recipe.scheme.lm_head is not None:
        raise CalibrantError(
            "the gguf format has no place for a quantized lm_head, which it has as Q8_0: leave lm_head out"
        )
    known = [
        name
        for name, one in GGUF_TYPES.items()
        if one.sub_scale is None and one.bits >= weights.bits and one.minima != weights.symmetric
    ]
    if recipe.scheme.activations is not None:
        raise CalibrantError(
            "GGUF files say nothing of activations, which llama.cpp rounds in its own way: leave them out"
        )
    if weights.type != "int" or not known:
        kind = weights.type if weights.type != "int" else "these integers"
        raise CalibrantError(f"no type of GGUF files has {kind}: take one of {', '.join(GGUF_TYPES)}")
    search: RangeSearch = "none" if weights.range_search in ("none", "mse") else "importance"
    if recipe.budget is not None:
        raise CalibrantError("a budget of bits needs layers that compressed-tensors can hold packed: leave gguf out")
    return recipe.with_type(known[0], search), "gguf"


def _with_fallbacks(plan: Plan) -> Plan:
    """``plan`` with another type for layers that super-blocks of 256 do not divide.

    Raises:
        CalibrantError: the groups of a type that a layer may get do not divide its inputs.
    """
    weights, budget = plan.recipe.scheme.weights, plan.recipe.budget
    if weights is None or weights.gguf is None:
        return plan
    kind = weights.gguf.name
    for choice in [kind, *(choice for choice in (budget.choices if budget else ()) if isinstance(choice, str))]:
        for name, layer in plan.layers.items():
            fitting = GGUF_TYPES[fitting_type(choice, layer.shape[-1])]
            if layer.shape[-1] % fitting.block:
                raise CalibrantError(
                    f"{name}: blocks of {fitting.block} weights of the type {fitting.name} do not divide its "
                    f"{layer.shape[-1]} inputs; ignore it, or take compressed-tensors"
                )
    wrong = [name for name, layer in plan.layers.items() if fitting_type(kind, layer.shape[-1]) != kind]
    if not wrong or budget is not None:
        return plan
    note = (
        f"{len(wrong)} of {len(plan.layers)} layers have inputs that super-blocks of {SUPER_BLOCK} do not divide "
        f"({wrong[0]}: {plan.layers[wrong[0]].shape[-1]}): they become {weights.gguf.fallback}, as in llama.cpp"
    )
    return replace(plan.with_choices(dict.fromkeys(wrong, kind)), notes=[*plan.notes, note])


def _is_native(model: LazyModel, layers: ModelLayers, recipe: Recipe) -> bool:
    """Whether GPT-OSS's own format holds the result: its experts in MXFP4."""
    weights = recipe.scheme.weights
    is_mxfp4 = weights is not None and weights.type == "mxfp4" and recipe.scheme.activations is None
    if not is_mxfp4 or not layers.fused or model.folder.config.model_type != "gpt_oss":
        return False
    left = next((name for name in fused_parameters(model.module) if name not in layers.fused), None)
    if left is not None:
        raise CalibrantError(f"{left}: GPT-OSS's own format has all experts in MXFP4; take the experts out of ignore")
    return True


def _fit_groups(recipe: Recipe, layers: ModelLayers) -> Recipe:
    weights = recipe.scheme.weights
    # Layers that do not divide into blocks of llama.cpp's types may get other types, below.
    if weights is None or weights.group_size is None or weights.gguf is not None:
        return recipe
    widths = layers.widths()
    if weights.group_size == "auto":
        fitting = [size for size in AUTOMATIC_GROUP_SIZES if all(width % size == 0 for width in widths.values())]
        return recipe.with_weights(None, fitting[0] if fitting else 0)
    wrong = {name: width for name, width in widths.items() if width % int(weights.group_size)}
    if not wrong:
        return recipe
    name, width = next(iter(wrong.items()))
    powers = [size for size in (256, 128, 64, 32, 16, 8, 4) if all(w % size == 0 for w in widths.values())]
    fits = ", ".join(map(str, powers)) if powers else "none"
    way = f"sizes that fit every layer: {fits}; `group_size=0` takes one scale per channel"
    if weights.floating:
        way = f"{weights.type} has no other size: ignore these layers, or take fp8 or integers"
    raise CalibrantError(
        f"group size {weights.group_size} does not divide the {width} inputs of {name}{and_more(len(wrong) - 1)}; {way}"
    )


def _sparsity(recipe: Recipe) -> Sparsity | None:
    text = recipe.scheme.sparsity
    return Sparsity.of_text(text) if text is not None else None


def _grid_and_layout(model: LazyModel, recipe: Recipe, format_name: FormatName) -> tuple[GridSpec, Layout]:
    weights = recipe.scheme.weights
    assert weights is not None
    group = weights.group_size if isinstance(weights.group_size, int) else None
    scale_dtype = model.folder.dtype if format_name == "compressed-tensors" else torch.float16
    scale_dtype = _SCALES.get(weights.type, scale_dtype)
    rows = _SCALE_ROWS[weights.granularity]
    width = BLOCK_SIZE if weights.granularity == "block" else group
    spec = GridSpec(
        weights.bits,
        weights.symmetric,
        width,
        scale_dtype,
        weights.range_search,
        weights.floating,
        rows,
        signed_scales=weights.signed_scales,
    )
    if weights.gguf is not None:
        spec = gguf_spec(weights.type, weights.range_search)
    activations = recipe.scheme.activations
    layout = Layout(
        weights.bits,
        weights.symmetric,
        group,
        _activations(recipe),
        format_name,
        weights.type,
        weights.granularity,
        activations.type if activations is not None else "int8",
    )
    return spec, layout


def _activations(recipe: Recipe) -> Literal["dynamic", "static"] | None:
    activations = recipe.scheme.activations
    return None if activations is None else "dynamic" if activations.dynamic else "static"
