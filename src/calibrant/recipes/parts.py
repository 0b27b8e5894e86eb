"""The parts of a recipe: scheme, budget, transforms."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from calibrant.formats.gguf_types import GGUF_TYPES, GgufName, GgufType
from calibrant.formats.kv_cache import KvCacheGranularity, KvCacheLayout, KvCacheType
from calibrant.formats.quantized import STORED_WIDTHS, Granularity, InputType, WeightType
from calibrant.quantization.activation_ranges import RangeRule
from calibrant.quantization.grids import RangeSearch
from calibrant.strict import Strict

# Bits and group size of floating-point weights, and of llama.cpp's types.
_FLOATS: dict[str, tuple[int, int | None]] = {"fp8": (8, None), "mxfp4": (4, 32), "nvfp4": (4, 16)}
_TYPES = _FLOATS | {name: (one.bits, one.group_size) for name, one in GGUF_TYPES.items()}
# Four-bit integers beside FP8 activations, in groups, and the group size of vLLM's kernels for them.
_MIXED_BITS = 4


# Of a budget: bits, a share of zeros, or one of llama.cpp's types.
Choice = float | GgufName


class Weights(Strict):
    """Weight quantization.

    ``type``: integers of ``bits`` bits; "fp8" (E4M3), with one scale for each channel, tensor or block of 128 x 128
    weights, by ``granularity``; "mxfp4" and "nvfp4" (E2M1), in groups of 32 with a power of two as their scale, and in
    groups of 16 with an E4M3 scale; "q4_0" to "q6_k" are llama.cpp's types. ``group_size``: None is one scale per
    output channel, "auto" the largest of 128, 64, 32 that divides every layer's inputs. ``range_search``: "none",
    "mse" and "four-over-six" need no data; "importance" and "clip" use statistics of the inputs. ``signed_scales``: the
    search tries each scale of symmetric integers with both signs, since they have one more code on one side.
    """

    type: WeightType = "int"
    bits: int = Field(ge=2, le=8)
    symmetric: bool = True
    group_size: int | Literal["auto"] | None = None
    range_search: RangeSearch = "none"
    granularity: Granularity = "channel"
    signed_scales: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_type(cls, value: Any) -> Any:
        """Types other than integers say their own bits, group size and symmetry."""
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in _TYPES:
            return value
        bits, group_size = _TYPES[kind]
        minima = kind in GGUF_TYPES and GGUF_TYPES[kind].minima
        return {"bits": bits, "group_size": group_size, "symmetric": not minima, **value}

    @model_validator(mode="after")
    def _float(self) -> "Weights":
        fine = self.granularity != "channel"
        if self.range_search == "four-over-six" and self.type not in ("mxfp4", "nvfp4"):
            raise ValueError("range_search four-over-six is for the types mxfp4 and nvfp4")
        if self.signed_scales and (self.type != "int" or not self.symmetric or self.range_search == "none"):
            raise ValueError("signed_scales are for symmetric integers with a range_search")
        if fine and (self.type != "fp8" or self.range_search != "none"):
            raise ValueError("granularity tensor or block is for the type fp8, without range_search")
        if self.type == "int":
            return self
        minima = self.type in GGUF_TYPES and GGUF_TYPES[self.type].minima
        if (self.bits, self.group_size) != _TYPES[self.type] or self.symmetric == minima:
            bits, group_size = _TYPES[self.type]
            groups = f"groups of {group_size}" if group_size else "no groups"
            points = "minima" if minima else "no zero points"
            raise ValueError(f"{self.type} weights have {bits} bits, {groups} and {points}: leave the keys out")
        if self.type in GGUF_TYPES and self.range_search not in ("none", "importance"):
            raise ValueError(f"{self.type} fits its own ranges: range_search is importance, or none")
        return self

    @property
    def floating(self) -> bool:
        """Whether the weights become floating-point numbers."""
        return self.type in _FLOATS

    @property
    def gguf(self) -> GgufType | None:
        """The facts of llama.cpp's type, if the weights have one."""
        return GGUF_TYPES.get(self.type)

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("group_size must be at least 1 (leave it out for one scale per channel)")
        return value


class Activations(Strict):
    """Activation quantization.

    ``dynamic``: symmetric, scales computed at run time, one per token (for weights in blocks one per 128 values, for
    mxfp4 per 32, for nvfp4 per 16). Static: one range per tensor, asymmetric for int8, which ``range`` chooses from the
    calibration data: minimum to maximum ("minmax"), ``percentile`` percent of the values ("percentile"), or the least
    squared error ("mse"). Floating-point activations are symmetric and know "minmax" only.
    """

    type: InputType = "int8"
    dynamic: bool = True
    range: RangeRule = "minmax"
    percentile: float = Field(default=99.99, gt=50, lt=100)

    @model_validator(mode="after")
    def _static(self) -> "Activations":
        rule = Activations.model_fields
        if self.dynamic and (self.range, self.percentile) != (rule["range"].default, rule["percentile"].default):
            raise ValueError("range and percentile are for static activations: add dynamic: false")
        if self.range != "percentile" and self.percentile != rule["percentile"].default:
            raise ValueError("percentile is for range: percentile")
        if self.type != "int8" and self.range != "minmax":
            raise ValueError(f"range {self.range} is for int8 activations: leave it out")
        if self.type in ("mxfp4", "nvfp4") and not self.dynamic:
            raise ValueError(f"{self.type} activations find their scales at run time: leave dynamic out")
        return self

    @property
    def observed(self) -> bool:
        """Whether inputs are observed on calibration data: for static ranges, and for nvfp4's scale of a tensor."""
        return not self.dynamic or self.type == "nvfp4"


class KvCache(Strict):
    """Quantization of the keys and values that engines keep of a text, symmetric and static.

    ``granularity``: one scale for the keys and one for the values of a layer ("tensor"), or of each head ("head").
    """

    type: KvCacheType = "fp8"
    granularity: KvCacheGranularity = "tensor"

    @property
    def layout(self) -> KvCacheLayout:
        """How checkpoints say it."""
        return KvCacheLayout(self.type, self.granularity)


class Head(Strict):
    """Quantization of ``lm_head``, the output matrix: symmetric integers on ranges of least error.

    ``group_size``: None is one scale for each token of the vocabulary, "auto" the largest of 128, 64, 32 that divides
    the width.
    """

    bits: Literal[4, 8] = 8
    group_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None


class StarvedExperts(Strict):
    """What is done for experts of a mixture that fewer than ``least_tokens`` calibration tokens reach.

    "all-tokens": all tokens go to them for their statistics, while the routed output continues. "more-rows": before the
    run, rows that the model writes and that reach them are added to the calibration set, at most as many as it has.
    """

    starved: Literal["all-tokens", "more-rows"]
    least_tokens: int = Field(default=128, ge=1)


class Scheme(Strict):
    """Compression target; ``sparsity`` is a share of zeros ("0.5") or a pattern ("2:4": two of every four kept)."""

    weights: Weights | None = None
    activations: Activations | None = None
    kv_cache: KvCache | None = None
    lm_head: Head | None = None
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
        if self.kv_cache is not None and self.weights is None:
            raise ValueError("a quantized kv_cache goes with quantized weights")
        if self.lm_head is not None and (self.weights is None or self.weights.type != "int" or self.activations):
            raise ValueError("a quantized lm_head goes with integer weights, and without quantized activations")
        if self.sparsity is not None and self.weights is not None and self.weights.gguf and self.weights.gguf.minima:
            raise ValueError(f"{self.weights.type} has minima, beside which no weight is exactly zero: drop sparsity")
        if self.activations is None:
            return self
        if self.weights is None:
            raise ValueError("quantized activations go with quantized weights")
        refusal = _activations_refusal(self.weights, self.activations)
        if refusal is not None:
            raise ValueError(refusal)
        return self


def _activations_refusal(weights: Weights, activations: Activations) -> str | None:
    """Why these do not go together, or None."""
    kind = activations.type
    if kind == "int8":
        if weights.type != "int":
            return f"int8 activations do not go with {weights.type} weights: give activations a type"
        if weights.bits == 8 and weights.group_size is not None:
            return "int8 activations need int8 weights with one scale per channel: leave group_size out"
    elif kind == "fp8" and weights.type == "int":
        mixed = weights.bits == _MIXED_BITS and weights.symmetric and weights.group_size is not None
        if not mixed or not activations.dynamic:
            return "fp8 activations of integer weights are dynamic, and need 4 bits, symmetric, in groups"
    elif kind != weights.type:
        return f"{kind} activations do not go with {weights.type} weights"
    elif weights.granularity == "block" and not activations.dynamic:
        return "weights in blocks have dynamic activations: leave dynamic out"
    elif weights.granularity == "channel" and kind == "fp8" and not activations.dynamic:
        return "static fp8 activations need weights with granularity: tensor, as engines have it"
    return None


class Budget(Strict):
    """Distribution over groups of layers of bits, of llama.cpp's types, or of shares of zeros: the ``choices`` that
    change the model least.

    ``average`` is the average over all weights, of types that of the bits in the file; None is the scheme's.
    """

    choices: list[Choice] = Field(min_length=2, max_length=16)
    average: float | None = None

    @field_validator("choices", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        for choice in value if isinstance(value, list) else ():
            if isinstance(choice, str) and choice not in GGUF_TYPES:
                raise ValueError(f"{choice!r} is no number and no type of GGUF files, of {', '.join(GGUF_TYPES)}")
        return value

    @property
    def of_types(self) -> bool:
        """Whether the choices are llama.cpp's types."""
        return any(isinstance(choice, str) for choice in self.choices)

    def refusal(self, scheme: Scheme) -> str | None:
        """Why ``scheme`` cannot have this budget, or None."""
        weights = scheme.weights
        if self.of_types or (weights is not None and weights.gguf is not None):
            return self._refusal_of_types(scheme)
        choices = [choice for choice in self.choices if not isinstance(choice, str)]
        if scheme.activations is not None or (weights is not None and scheme.sparsity is not None):
            return "a budget is of bits or of zeros, not of both, and not for int8 activations"
        if weights is not None and weights.type != "int":
            return f"a budget is of bits, which {weights.type} weights have no choice of"
        if weights is not None and not weights.symmetric:
            return "a budget of bits needs symmetric weights: transformers loads no others of mixed widths"
        if weights is not None and any(choice not in STORED_WIDTHS for choice in choices):
            return f"budget.choices: widths that files have, of {', '.join(map(str, STORED_WIDTHS))}"
        if weights is None and (":" in str(scheme.sparsity) or not all(0 <= choice < 1 for choice in choices)):
            return "budget.choices: shares of zeros from 0 to below 1, and no pattern n:m"
        average = self.average
        if average is None:
            average = weights.bits if weights is not None else float(str(scheme.sparsity))
        if len(set(choices)) < len(choices):
            return f"budget.choices: {choices} name one twice"
        if not min(choices) <= average <= max(choices):
            return f"budget: {choices} cannot average {average:g}; take others"
        return None

    def _refusal_of_types(self, scheme: Scheme) -> str | None:
        """Why ``scheme`` cannot have a budget of llama.cpp's types, or None."""
        weights, kinds = scheme.weights, [choice for choice in self.choices if isinstance(choice, str)]
        if scheme.sparsity is not None:
            return "a budget is of types or of zeros, not of both"
        if len(kinds) < len(self.choices) or weights is None or weights.gguf is None:
            return "a budget of types, such as [q3_k, q4_k, q6_k], goes with weights of such a type, and names no bits"
        if len(set(kinds)) < len(kinds):
            return f"budget.choices: {kinds} name one twice"
        bits = [GGUF_TYPES[kind].bits_per_weight for kind in kinds]
        average = self.average if self.average is not None else weights.gguf.bits_per_weight
        if not min(bits) <= average <= max(bits):
            return f"budget: {kinds} cannot average {average:g} bits; take others"
        return None


class Reconstruction(Strict):
    """Training of each solved block on the original block's outputs, in ``epochs`` passes over the calibration set.

    Kept weights of pruned layers and scales of quantized ones learn. A step takes rows of ``step_tokens`` tokens, at
    least one row and at most a micro-batch. ``learning_rate`` is relative to the root mean square of a layer's weights;
    scales learn at 0.3 of it.
    """

    epochs: int = Field(default=1, ge=1, le=1000)
    step_tokens: int = Field(default=512, ge=1, le=2**20)
    learning_rate: float = Field(default=0.01, gt=0, le=10)


class Distillation(Strict):
    """Training of the whole compressed model on the original's logits, in ``epochs`` passes over the calibration set.

    The same values learn as in a ``Reconstruction``, in all blocks together. A step takes ``batch_size`` rows.
    ``learning_rate`` is by how much of a step of its grid a group's largest code moves at first, as its scale learns;
    kept weights learn at 0.15 of it, relative to the root mean square of their layer. A ``seed`` that is left out is
    the run's; the order of the rows follows from it.
    """

    epochs: int = Field(default=2, ge=1, le=1000)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=0.015, gt=0, le=10)
    seed: int = Field(default=0, ge=0)


class SmoothQuant(Strict):
    """SmoothQuant: moves scales from norms into linears; ``alpha`` 1 moves the activations' whole range."""

    name: Literal["smoothquant"] = "smoothquant"
    alpha: float = Field(default=0.5, ge=0, le=1)


class Awq(Strict):
    """AWQ's channel scales, from a search over ``steps`` exponents; ``duo`` also divides by the weights' magnitude."""

    name: Literal["awq"] = "awq"
    steps: int = Field(default=20, ge=1, le=1000)
    duo: bool = False


class Quadapter(Strict):
    """Quadapter's channel scales, moved from norms into linears; learned block by block in ``steps`` Adam steps."""

    name: Literal["quadapter"] = "quadapter"
    steps: int = Field(default=100, ge=1, le=1_000_000)
    learning_rate: float = Field(default=0.06, gt=0)


Transform = Annotated[SmoothQuant | Awq | Quadapter, Field(discriminator="name")]
