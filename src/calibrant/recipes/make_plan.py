"""Fits a recipe to a model, before any weight is read."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_types import GGUF_TYPES, SUPER_BLOCK, fitting_type
from calibrant.formats.input_rounding import INPUT_ROUNDING
from calibrant.formats.quantized import BLOCK_SIZE, FormatName, Layout
from calibrant.formats.registry import format_for
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.modeling.attention_caches import cached_attentions
from calibrant.modeling.expert_tensors import expert_tensors, is_split
from calibrant.modeling.find_blocks import blocks_beside
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.linear_use import linear_use
from calibrant.modeling.packable import first_not_packable
from calibrant.modeling.structure import fused_parameters, routers
from calibrant.quantization.grids import MX_SCALE, NV_SCALE, GridSpec, RangeSearch
from calibrant.recipes.gguf_spec import gguf_spec
from calibrant.recipes.plan import LayerPlan, Plan, Target
from calibrant.recipes.recipe import AUTOMATIC_GROUP_SIZES, Recipe

# Below this share of the blocks' weights a plan warns of what it leaves.
_MOST = 0.9
_NAMED_PARTS = 4
_SCALES = {"mxfp4": MX_SCALE, "nvfp4": NV_SCALE}
# Rows with one scale; None: all.
_SCALE_ROWS = {"channel": 1, "tensor": None, "block": BLOCK_SIZE}
_NOT_ORDINARY = "is not an ordinary linear layer"
_PRUNED_DENSE = "pruned weights are stored dense: the zeros are there, the files do not get smaller"


@dataclass(frozen=True)
class _Layers:
    """Layers that a recipe applies to: linears with ``(out, in)`` and fused experts.

    ``unpackable`` has what keeps transformers from loading packed weights of this model: names, and what is so about
    each. ``uncalled`` are linears that no text calls, ``routers`` those that choose among fused experts,
    ``outside`` those for which GPT-OSS's own format has no place; ``joined`` are fused experts that loaders join.
    """

    linears: dict[str, tuple[int, int]]
    fused: dict[str, tuple[int, ...]]
    unpackable: dict[str, str]
    uncalled: list[str]
    routers: list[str]
    outside: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)

    @property
    def left_alone(self) -> frozenset[str]:
        """Linears that stay as they are without being ignored."""
        return frozenset([*self.routers, *self.outside])

    def experts_alone(self) -> "_Layers":
        """The fused experts; other linears stay as they are."""
        return replace(self, linears={}, unpackable={}, outside=list(self.linears))

    @property
    def obstacle(self) -> str:
        """The first of ``unpackable`` as a clause; empty if there is none."""
        return next((f"{name} {what}" for name, what in self.unpackable.items()), "")

    def widths(self) -> dict[str, int]:
        """Input width of each layer; both axes of fused experts, whose orientation is not known yet."""
        found = {name: shape[1] for name, shape in self.linears.items()}
        for name, shape in self.fused.items():
            found[name] = shape[2]
            found[f"{name} (other axis)"] = shape[1]
        return found

    def planned(self, target: Target) -> dict[str, LayerPlan]:
        """Plans of all layers, each with ``target``."""
        return {name: LayerPlan(shape, target) for name, shape in [*self.linears.items(), *self.fused.items()]}


def make_plan(
    model: LazyModel, blocks: list[str], chosen: Recipe, format_name: FormatName = "compressed-tensors"
) -> Plan:
    """Fit the ``chosen`` recipe to ``model``, to be stored in the format ``format_name``.

    Raises:
        CalibrantError: a group size or pattern does not divide a layer's inputs (the message lists sizes that do),
            nothing is left to compress, or the format cannot store the scheme or a layer.
    """
    layers = _layers(model, blocks, chosen)
    left = _left(model, blocks, layers)
    _check_ignored(model, chosen)
    left_notes = _left_notes(layers)
    if not layers.linears and not layers.fused:
        raise CalibrantError("nothing to compress: the recipe's ignore list covers every linear layer")
    if chosen.scheme.weights is not None:
        chosen, format_name = _as_gguf(chosen, format_name)
    if _is_native(model, layers, chosen):
        if format_name != "compressed-tensors":
            raise CalibrantError(f"GPT-OSS's experts in MXFP4 have a format of their own: leave out {format_name}")
        layers, format_name = layers.experts_alone(), "gpt-oss"
    recipe = _fit_groups(chosen, layers)
    _check_blocks(recipe, layers)
    sparsity = _sparsity(recipe)
    _check_pattern(recipe, sparsity, layers)
    _check_fused(recipe, layers.fused)
    if recipe.scheme.weights is None:
        if format_name != "compressed-tensors":
            raise CalibrantError(f"pruned models are stored dense: leave out the {format_name} format")
        notes = left_notes if recipe.changes_shape else [*left_notes, _PRUNED_DENSE]
        target = Target(None, sparsity, None)
        plan = Plan(recipe, blocks, target, layers.planned(target), notes, left, left_alone=layers.left_alone)
        return _with_share_note(plan)
    spec, layout = _grid_and_layout(model, recipe, format_name)
    _check_format(layout, layers, recipe)
    _check_bits_budget(layout, layers, recipe)
    _check_kv_cache(model, blocks, layout, layers, recipe)
    notes = [*left_notes, *_group_notes(chosen, spec), *_storage_notes(layout, layers, recipe)]
    stored = None if recipe.stored_dense or layers.unpackable else layout
    target = Target(spec, sparsity, stored)
    plan = Plan(recipe, blocks, target, layers.planned(target), notes, left, left_alone=layers.left_alone)
    return _with_share_note(_with_fallbacks(plan))


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
    known = [
        name
        for name, one in GGUF_TYPES.items()
        if one.sub_scale is None and one.bits >= weights.bits and one.minima != weights.symmetric
    ]
    if weights.type != "int" or recipe.scheme.activations is not None or not known:
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


def _left(model: LazyModel, blocks: list[str], layers: _Layers) -> dict[str, int]:
    """Sizes of the weights that stay as they are in the blocks, and in other blocks that a text runs through."""
    planned = {f"{name}.weight" for name in layers.linears} | set(layers.fused)
    return {
        f"{block}.{name}": parameter.numel()
        for block in [*blocks, *blocks_beside(model.module, blocks)]
        for name, parameter in model.module.get_submodule(block).named_parameters()
        if parameter.ndim > 1 and f"{block}.{name}" not in planned
    }


def _with_share_note(plan: Plan) -> Plan:
    """``plan`` with a warning if it compresses less than ``_MOST`` of the blocks' weights."""
    if plan.share >= _MOST:
        return plan
    sizes: dict[str, int] = {}
    for name, size in plan.left.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        sizes[kind] = sizes.get(kind, 0) + size
    whole = sum(sizes.values()) / (1 - plan.share)
    largest = sorted(sizes, key=lambda kind: -sizes[kind])[:_NAMED_PARTS]
    parts = ", ".join(f"{kind} ({sizes[kind] / whole:.0%})" for kind in largest)
    note = f"only {plan.share:.0%} of the blocks' weights are compressed; the largest parts left as they are: {parts}"
    return replace(plan, notes=[note, *plan.notes])


def _layers(model: LazyModel, blocks: list[str], recipe: Recipe) -> _Layers:
    found = _Layers({}, {}, {}, [], routers(model.module))
    use = linear_use(model.module, blocks)
    for name, module in model.module.named_modules():
        if not any(name.startswith(block + ".") for block in blocks):
            continue
        if name in found.routers or (isinstance(module, nn.Linear | Conv1D) and recipe.ignores(name)):
            continue
        if name in use.uncalled:
            found.uncalled.append(name)
        elif isinstance(module, nn.Linear):
            found.linears[name] = (module.out_features, module.in_features)
            # Loaders of quantized formats refuse subclasses (FalconLinear).
            if type(module) is not nn.Linear or not model.is_stored_alone(f"{name}.weight"):
                found.unpackable[name] = _NOT_ORDINARY
            elif name in use.read:
                found.unpackable[name] = "has a weight that the model reads beside the layer's own call"
        elif isinstance(module, Conv1D):
            found.linears[name] = (module.weight.shape[1], module.weight.shape[0])
            found.unpackable[name] = _NOT_ORDINARY
    for name, parameter in fused_parameters(model.module).items():
        if any(name.startswith(block + ".") for block in blocks):
            shape = tuple(parameter.shape)
            if recipe.ignores(name):
                found.unpackable[name] = "is fused and left as it is, beside which no packed layer is loaded"
                continue
            found.fused[name] = shape
            if not expert_tensors(model.module, name, shape):
                found.unpackable[name] = "is fused in checkpoints too"
            elif not is_split(model.module, name):
                found.joined.append(name)
    # transformers unpacks whatever it converts, packed or not; of experts it knows how.
    for name in set(model.converted) - found.fused.keys():
        found.unpackable.setdefault(name, "is made of other tensors while it is loaded")
    if not found.unpackable:
        name = first_not_packable(model.module, found.linears)
        if name is not None:
            found.unpackable[name] = "has a weight that the model's initialization reads"
    return found


def _check_ignored(model: LazyModel, recipe: Recipe) -> None:
    """Refuse an expression without a match: a typo would compress layers that should be left alone."""
    modules = [name for name, _ in model.module.named_modules() if name]
    names = [*modules, *fused_parameters(model.module)]
    for expression in recipe.ignore:
        if not any(recipe.matches(expression, name) for name in names):
            raise CalibrantError(f"ignore: {expression!r} is in no module's name; this model has, say, {modules[-1]}")


def _fit_groups(recipe: Recipe, layers: _Layers) -> Recipe:
    weights = recipe.scheme.weights
    if weights is None or weights.group_size is None:
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
    raise CalibrantError(
        f"group size {weights.group_size} does not divide the {width} inputs of {name} "
        f"(and {len(wrong) - 1} more layers); "
        f"sizes that fit every layer: {fits}; `group_size=0` takes one scale per channel"
    )


def _check_blocks(recipe: Recipe, layers: _Layers) -> None:
    """Refuse blocks of weights that do not divide a layer, which engines cannot fuse with others.

    Raises:
        CalibrantError: a layer has other sizes, or is a fused expert or float inputs are not stored.
    """
    weights, activations = recipe.scheme.weights, recipe.scheme.activations
    if weights is not None and weights.granularity == "block":
        wrong = {name: shape for name, shape in layers.linears.items() if any(size % BLOCK_SIZE for size in shape)}
        if wrong or layers.fused:
            name = next(iter(wrong or layers.fused))
            raise CalibrantError(
                f"blocks of {BLOCK_SIZE} x {BLOCK_SIZE} do not divide {name}; take granularity: channel, or ignore it"
            )
    if activations is not None and activations.type != "int8" and layers.unpackable:
        raise CalibrantError(
            f"a model whose {layers.obstacle} has no checkpoint with {activations.type} activations: "
            "leave activations out, or take int8"
        )


def _sparsity(recipe: Recipe) -> Sparsity | None:
    text = recipe.scheme.sparsity
    if text is None:
        return None
    if ":" in text:
        kept, of = text.split(":")
        return Sparsity.n_of_m(int(kept), int(of))
    return Sparsity(float(text))


def _check_pattern(recipe: Recipe, sparsity: Sparsity | None, layers: _Layers) -> None:
    if sparsity is None or not sparsity.semi_structured:
        return
    for name, width in layers.widths().items():
        if width % sparsity.of:
            raise CalibrantError(
                f"pattern {recipe.scheme.sparsity} does not divide the {width} inputs of {name}; "
                "leave the layer out with ignore, or take a share such as 0.5"
            )


def _is_native(model: LazyModel, layers: _Layers, recipe: Recipe) -> bool:
    """Whether GPT-OSS's own format holds the result: its experts in MXFP4."""
    weights = recipe.scheme.weights
    is_mxfp4 = weights is not None and weights.type == "mxfp4" and recipe.scheme.activations is None
    if not is_mxfp4 or not layers.fused or model.folder.config.model_type != "gpt_oss":
        return False
    left = next((name for name in fused_parameters(model.module) if name not in layers.fused), None)
    if left is not None:
        raise CalibrantError(f"{left}: GPT-OSS's own format has all experts in MXFP4; take the experts out of ignore")
    return True


def _check_fused(recipe: Recipe, fused: dict[str, tuple[int, ...]]) -> None:
    """Refuse recipes that do not support fused experts, if the model has any."""
    refusal = None
    if recipe.quadapter is not None:
        refusal = "which quadapter learns no scales for; ignore them"
    elif recipe.training is not None:
        refusal = f"which {recipe.method.name} cannot train; ignore them"
    elif recipe.drift_correction:
        refusal = "beside which the original model cannot run; take a recipe without that"
    elif recipe.budget is not None:
        refusal = "which a budget cannot measure; take a recipe without that"
    elif recipe.scheme.activations is not None:
        refusal = "which quantized activations do not go with; take a weight-only recipe"
    if fused and refusal is not None:
        raise CalibrantError(f"{next(iter(fused))}: fused experts, {refusal}")


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


def _check_format(layout: Layout, layers: _Layers, recipe: Recipe) -> None:
    """Check that the format can store the result.

    Raises:
        CalibrantError: the scheme, the method or a layer does not fit the format.
    """
    if layout.format == "compressed-tensors" and layers.joined and not layout.symmetric and not layers.unpackable:
        raise CalibrantError(
            f"{layers.joined[0]}: no engine loads packed experts with zero points; take symmetric weights, or ignore "
            "the experts"
        )
    if layout.format in ("compressed-tensors", "gpt-oss"):
        return
    if layout.format == "gguf":
        if recipe.stored_dense or layers.unpackable or layers.fused:
            what = (
                recipe.method.name if recipe.stored_dense else f"a model whose {layers.obstacle or 'experts are fused'}"
            )
            raise CalibrantError(f"{what} fits no GGUF file here: take compressed-tensors")
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
        what = recipe.method.name if recipe.stored_dense else f"a model whose {layers.obstacle}"
        refusal = f"{what} fits no {layout.format} checkpoint: take compressed-tensors"
    # Codes that fill words together.
    whole = 32 // math.gcd(32, layout.stored_bits)
    for name, shape in layers.linears.items():
        if any(size % whole for size in shape):
            refusal = refusal or f"{name}: the {layout.format} format needs sizes that {whole} divides, it has {shape}"
    if refusal:
        raise CalibrantError(refusal)


def _check_bits_budget(layout: Layout, layers: _Layers, recipe: Recipe) -> None:
    if recipe.budget is None:
        return
    holder = "gguf" if recipe.budget.of_types else "compressed-tensors"
    if layout.format != holder or layers.unpackable or recipe.stored_dense:
        what = layers.obstacle or f"{recipe.method.name} or {layout.format} was chosen"
        raise CalibrantError(f"a budget of {recipe.budget.unit} needs layers that {holder} can hold packed, but {what}")


def _check_kv_cache(model: LazyModel, blocks: list[str], layout: Layout, layers: _Layers, recipe: Recipe) -> None:
    """Refuse quantized keys and values that no checkpoint of compressed-tensors can describe."""
    if recipe.scheme.kv_cache is None:
        return
    if layout.format != "compressed-tensors" or layers.unpackable:
        what = f"a model whose {layers.obstacle}" if layers.unpackable else f"the {layout.format} format"
        raise CalibrantError(f"{what} has no place for scales of keys and values: leave kv_cache out")
    attentions = cached_attentions(model.module)
    outside = [name for name in attentions if not any(name.startswith(f"{block}.") for block in blocks)]
    text: Any = model.folder.config.get_text_config(decoder=True)
    if not attentions or outside or getattr(text, "num_key_value_heads", None) is None:
        which = f"{outside[0]} is in no block" if outside else "compressed-tensors finds no attention that keeps them"
        raise CalibrantError(f"kv_cache: keys and values of this model cannot be quantized ({which}): leave it out")


def _group_notes(chosen: Recipe, spec: GridSpec) -> list[str]:
    """The group size that ``auto`` resolved to."""
    if chosen.scheme.weights is None or chosen.scheme.weights.group_size != "auto":
        return []
    if spec.group_size:
        return [f"groups of {spec.group_size}"]
    return ["no group size fits every layer: one scale a channel"]


def _left_notes(layers: _Layers) -> list[str]:
    """The linears that stay as they are because no text calls them, or because they choose among experts."""
    notes = []
    for left, why in ((layers.uncalled, "no text calls them"), (layers.routers, "they choose among experts")):
        if left:
            more = f" and {len(left) - 1} more layers" if len(left) > 1 else ""
            notes.append(f"left as they are, since {why}: {left[0]}{more}")
    return notes


def _storage_notes(layout: Layout, layers: _Layers, recipe: Recipe) -> list[str]:
    """Notes on how values are stored, where a user may expect something else."""
    if recipe.stored_dense:
        return [f"{recipe.method.name} fits no quantized format: its values are stored dense"]
    if layers.unpackable:
        dense = (
            f"{layers.obstacle}, and transformers {transformers.__version__} loads such a model from no quantized "
            "format: the quantized values are stored dense, so the files do not get smaller"
        )
        inputs = (
            f"its int8 inputs are described in {INPUT_ROUNDING}, which calibrant evaluate computes with; "
            "loaders of others see the rounded weights alone"
        )
        return [dense, inputs] if layout.activations else [dense]
    if layout.format == "gpt-oss":
        return [
            f"GPT-OSS's own format has its experts in MXFP4 alone: {len(layers.outside)} other linears stay as they are"
        ]
    if layout.format == "gguf":
        return [
            "model.gguf is for llama.cpp; model.safetensors has the same blocks for calibrant, and no other loader "
            "reads it"
        ]
    if layout.type == "nvfp4" and layers.fused:
        return [
            f"transformers {transformers.__version__} drops one scale when it loads NVFP4 experts, and gives "
            "wrong values without a word: load the result with vLLM or calibrant"
        ]
    if layout.type in _SCALES:
        return [
            f"transformers {transformers.__version__} computes with four-bit floats in bfloat16 alone: pass "
            "from_pretrained dtype=torch.bfloat16"
        ]
    if not layout.symmetric and not layout.activations and layout.format == "compressed-tensors":
        return [
            f"transformers {transformers.__version__} loads asymmetric packed weights only unpacked: pass "
            "from_pretrained quantization_config=CompressedTensorsConfig(dequantize=True)"
        ]
    if layout.activations and layout.input_type == "int8" and layout.bits < 8:
        return [
            f"{layout.bits}-bit weights beside int8 activations are stored as int8 tensors, as engines read them: "
            "the files are as large as those of 8 bits"
        ]
    if layout.stored_bits != layout.bits and recipe.budget is None:
        note = f"{layout.bits}-bit values are stored in {layout.stored_bits} bits, which every loader reads alike"
        return [f"{note}; the gptq format has 3 bits" if layout.bits == 3 else note]
    return []
