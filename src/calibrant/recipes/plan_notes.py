"""Notes of a plan, where a user may expect something else."""

import re
from dataclasses import replace
from importlib.metadata import version

import transformers

from calibrant.formats.input_rounding import INPUT_ROUNDING
from calibrant.formats.quantized import Layout
from calibrant.quantization.grids import GridSpec
from calibrant.recipes.model_layers import ModelLayers
from calibrant.recipes.plan import HeadPlan, Plan
from calibrant.recipes.recipe import Recipe
from calibrant.wording import and_more

WRONG_EXPERTS = "drops one scale when it loads NVFP4 experts,"
"""Part of the note on checkpoints that transformers loads wrongly."""

# Below this share of the blocks' weights a plan warns of what it leaves.
_MOST = 0.9
_NAMED_PARTS = 4


def left_notes(layers: ModelLayers) -> list[str]:
    """The linears that stay as they are because no text runs through them, or because they choose among experts."""
    notes = []
    reasons = (
        (layers.uncalled, "a text does not run through them as layers"),
        (layers.routers, "they choose among experts"),
        (layers.shared, "layers share their weights"),
    )
    for left, why in reasons:
        if left:
            notes.append(f"left as they are, since {why}: {left[0]}{and_more(len(left) - 1)}")
    return notes


def group_notes(chosen: Recipe, spec: GridSpec) -> list[str]:
    """The group size that ``auto`` resolved to."""
    if chosen.scheme.weights is None or chosen.scheme.weights.group_size != "auto":
        return []
    if spec.group_size:
        return [f"weights share a scale in groups of {spec.group_size}, the largest size that fits every layer"]
    return ["weights share a scale in each channel, since no group size fits every layer"]


def head_notes(head: HeadPlan | None) -> list[str]:
    """What becomes of the output matrix, and by which layout."""
    if head is None or head.layer.target.layout is None:
        return []
    layout = head.layer.target.layout
    groups = f"groups of {layout.group_size}" if layout.group_size else "one scale a token"
    return [f"{head.name}: {layout.bits} bits, {groups}"]


def storage_notes(layout: Layout, layers: ModelLayers, recipe: Recipe) -> list[str]:
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
    if layout.type == "nvfp4" and layers.joined:
        return [
            f"transformers {transformers.__version__} {WRONG_EXPERTS} and gives wrong values without a word: do not "
            "load the result there"
        ]
    if layout.type in ("mxfp4", "nvfp4"):
        return [
            f"transformers {transformers.__version__} computes with four-bit floats in bfloat16 alone: pass "
            "from_pretrained dtype=torch.bfloat16"
        ]
    if not layout.symmetric and not layout.activations and layout.format == "compressed-tensors":
        return [
            f"transformers {transformers.__version__} loads asymmetric packed weights only unpacked: pass "
            "from_pretrained quantization_config=CompressedTensorsConfig(dequantize=True)"
        ]
    if layout.activations == "dynamic" and layers.flat and layout.format == "compressed-tensors":
        return [
            f"{layers.flat[0]} gets all tokens as rows of one matrix, of which compressed-tensors "
            f"{version('compressed-tensors')} rounds all by one scale: in transformers the result is worse than what "
            "vLLM and calibrant compute"
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


def with_share_note(plan: Plan) -> Plan:
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
