"""What a recipe, a model and a checkpoint format cannot be together; each check raises before any work."""

import math
from typing import Any

from calibrant.errors import CalibrantError
from calibrant.formats.quantized import BLOCK_SIZE, Layout
from calibrant.formats.registry import format_for
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.modeling.attention_caches import cached_attentions
from calibrant.modeling.find_blocks import text_calls
from calibrant.modeling.inputs import carried_values
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import fused_parameters
from calibrant.recipes.model_layers import ModelLayers
from calibrant.recipes.recipe import Recipe


def check_ignored(model: LazyModel, recipe: Recipe) -> None:
    """Refuse an expression without a match: a typo would compress layers that should be left alone."""
    modules = [name for name, _ in model.module.named_modules() if name]
    names = [*modules, *fused_parameters(model.module)]
    for expression in recipe.ignore:
        if not any(recipe.matches(expression, name) for name in names):
            raise CalibrantError(f"ignore: {expression!r} is in no module's name; this model has, say, {modules[-1]}")


def check_blocks(recipe: Recipe, layers: ModelLayers) -> None:
    """Refuse blocks of weights that do not divide a layer, which engines cannot fuse with others.

    Raises:
        CalibrantError: a layer has other sizes, or is a fused expert or float inputs are not stored.
    """
    weights, activations = recipe.scheme.weights, recipe.scheme.activations
    if weights is not None and weights.granularity == "block":
        wrong = {name: shape for name, shape in layers.linears.items() if any(size % BLOCK_SIZE for size in shape)}
        if wrong:
            raise CalibrantError(
                f"blocks of {BLOCK_SIZE} x {BLOCK_SIZE} do not divide {next(iter(wrong))}; take granularity: channel, "
                "or ignore it"
            )
        if layers.fused:
            raise CalibrantError(
                f"{next(iter(layers.fused))}: fused experts, which do not become blocks of {BLOCK_SIZE} x {BLOCK_SIZE} "
                "here; take granularity: channel"
            )
    if activations is not None and activations.type != "int8" and layers.unpackable:
        raise CalibrantError(
            f"{layers.obstacle}, so no checkpoint of this model has {activations.type} activations: leave activations "
            f"out{'' if layers.fused else ', or take int8'}"
        )


def check_pattern(recipe: Recipe, sparsity: Sparsity | None, layers: ModelLayers) -> None:
    if sparsity is None or not sparsity.semi_structured:
        return
    for name, width in layers.widths().items():
        if width % sparsity.of:
            raise CalibrantError(
                f"pattern {recipe.scheme.sparsity} does not divide the {width} inputs of {name}; "
                "leave the layer out with ignore, or take a share such as 0.5"
            )


def check_fused(recipe: Recipe, fused: dict[str, tuple[int, ...]]) -> None:
    """Refuse recipes that do not support fused experts, if the model has any."""
    refusal = None
    if recipe.quadapter is not None:
        refusal = "which quadapter learns no scales for; ignore them"
    elif recipe.training is not None:
        refusal = f"which {recipe.method.name} cannot train; ignore them"
    elif recipe.beside_original:
        what = "drift_correction" if recipe.drift_correction else "reconstruction"
        refusal = f"beside which the original model cannot run; take a recipe without {what}"
    elif recipe.distillation is not None:
        refusal = "which distillation does not train; take a recipe without distillation"
    elif recipe.budget is not None:
        refusal = "which a budget cannot measure; take a recipe without that"
    elif recipe.scheme.activations is not None:
        refusal = "which quantized activations do not go with; take a weight-only recipe"
    if fused and refusal is not None:
        raise CalibrantError(f"{next(iter(fused))}: fused experts, {refusal}")


def check_format(layout: Layout, layers: ModelLayers, recipe: Recipe) -> None:
    """Check that the format can store the result.

    Raises:
        CalibrantError: the scheme, the method or a layer does not fit the format.
    """
    if layout.format == "compressed-tensors" and layers.joined and not layout.symmetric and not layers.unpackable:
        raise CalibrantError(
            f"{layers.joined[0]}: no engine loads packed experts with zero points; take symmetric weights"
        )
    if layout.format in ("compressed-tensors", "gpt-oss"):
        return
    if layout.format == "gguf":
        if recipe.stored_dense or layers.unpackable or layers.fused:
            what = layers.obstacle or "the experts are fused"
            what = f"{recipe.method.name} has values that no type holds" if recipe.stored_dense else what
            raise CalibrantError(f"{what}, so no GGUF file is written: take compressed-tensors")
        return
    if layout.type != "int":
        raise CalibrantError(f"the {layout.format} format is for integers: take compressed-tensors for {layout.type}")
    refusal = format_for(layout).refusal(layout)
    if layout.activations:
        refusal = f"the {layout.format} format is for weights alone: take compressed-tensors for quantized activations"
    if layers.fused:
        refusal = f"{next(iter(layers.fused))} is fused, which the {layout.format} format has no names for: "
        refusal += "take compressed-tensors"
    if recipe.stored_dense or layers.unpackable:
        what = f"{recipe.method.name} stores its values dense" if recipe.stored_dense else layers.obstacle
        refusal = f"{what}, so no {layout.format} checkpoint is written: take compressed-tensors"
    # Codes that fill words together.
    whole = 32 // math.gcd(32, layout.stored_bits)
    for name, shape in layers.linears.items():
        if any(size % whole for size in shape):
            refusal = refusal or f"{name}: the {layout.format} format needs sizes that {whole} divides, it has {shape}"
    if refusal:
        raise CalibrantError(refusal)


def check_distillation(recipe: Recipe, layers: ModelLayers) -> None:
    """Refuse to train scales that are not stored."""
    if recipe.distillation is not None and layers.unpackable:
        raise CalibrantError(
            f"{layers.obstacle}, so weights are stored dense, without scales that distillation could train; take a "
            "recipe without distillation"
        )


def check_bits_budget(layout: Layout, layers: ModelLayers, recipe: Recipe) -> None:
    if recipe.budget is None:
        return
    holder, unit = ("gguf", "types") if recipe.budget.of_types else ("compressed-tensors", "bits")
    if layout.format != holder or layers.unpackable or recipe.stored_dense:
        what = layers.obstacle or f"{recipe.method.name} or {layout.format} was chosen"
        raise CalibrantError(f"a budget of {unit} needs layers that {holder} can hold packed, but {what}")


def check_carried(model: LazyModel, blocks: list[str], recipe: Recipe) -> None:
    """Refuse recipes that run blocks beside others, if blocks hand more than hidden states on."""
    if recipe.budget is not None:
        what = "a budget"
    elif recipe.beside_original:
        what = "drift_correction" if recipe.drift_correction else "reconstruction"
    elif recipe.quadapter is not None or recipe.changes_shape:
        what = "quadapter" if recipe.quadapter is not None else recipe.method.name
    else:
        return
    calls = [call for call in text_calls(model.module) if call.name in blocks]
    if carried_values([(call.args, call.kwargs) for call in calls]):
        raise CalibrantError(
            f"{type(model.module).__name__}: its blocks hand more than hidden states on, which {what} does not follow; "
            "take a recipe without that"
        )


def check_kv_cache(model: LazyModel, blocks: list[str], layout: Layout, layers: ModelLayers, recipe: Recipe) -> None:
    """Refuse quantized keys and values that no checkpoint of compressed-tensors can describe."""
    if recipe.scheme.kv_cache is None:
        return
    if layout.format != "compressed-tensors" or layers.unpackable:
        if layers.unpackable:
            raise CalibrantError(f"{layers.obstacle}, so scales of keys and values have no place: leave kv_cache out")
        raise CalibrantError(
            f"the {layout.format} format has no place for scales of keys and values: leave kv_cache out"
        )
    attentions = cached_attentions(model.module)
    outside = [name for name in attentions if not any(name.startswith(f"{block}.") for block in blocks)]
    text: Any = model.folder.config.get_text_config(decoder=True)
    if not attentions or outside or getattr(text, "num_key_value_heads", None) is None:
        which = f"{outside[0]} is in no block" if outside else "compressed-tensors finds no attention that keeps them"
        raise CalibrantError(f"kv_cache: keys and values of this model cannot be quantized ({which}): leave it out")
