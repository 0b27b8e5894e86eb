"""What a recipe is put together from: its scheme, a budget, transforms, a training."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from calibrant.quantization.activation_ranges import RangeRule
from calibrant.quantization.grids import RangeSearch
from calibrant.strict import Strict

# A look at a training runs on at most so many tokens: it should cost little beside the steps between two (ours).
WATCHED_TOKENS = 4096
# Logits of so many bytes are held at a time (ours).
_LOGIT_BYTES = 2**28


class Weights(Strict):
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


class Activations(Strict):
    """Activation quantization to int8.

    ``dynamic``: symmetric, one scale a token, found at run time. Static: asymmetric, one range a tensor, chosen by
    ``range`` from the calibration data: all that was seen ("minmax"), ``percentile`` percent of it, or what costs the
    least squared error ("mse").
    """

    bits: Literal[8] = 8
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
        return self


class Scheme(Strict):
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
        if self.activations is None:
            return self
        if self.weights is None:
            raise ValueError("int8 activations go with quantized weights")
        if self.weights.bits == 8 and self.weights.group_size is not None:
            raise ValueError("int8 activations go with one scale a channel of int8 weights: leave group_size out")
        return self


class Budget(Strict):
    """Bits, or the share of zeros, by group of layers: those of ``choices`` that move the model least.

    ``average`` over all weights; where left out, the scheme's own bits or share.
    """

    choices: list[float] = Field(min_length=2)
    average: float | None = None


class SmoothQuant(Strict):
    """SmoothQuant: scales from norms into linears; ``alpha`` 1 moves the activations' whole range."""

    name: Literal["smoothquant"]
    alpha: float = Field(default=0.5, ge=0, le=1)


class Awq(Strict):
    """AWQ's channel scales, searched over ``steps`` powers; ``duo`` also divides by the weights' magnitude."""

    name: Literal["awq"]
    steps: int = Field(default=20, ge=1)
    duo: bool = False


class Quadapter(Strict):
    """Quadapter's channel scales from norms into linears, learned block by block in so many ``steps`` of Adam."""

    name: Literal["quadapter"]
    steps: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=0.06, gt=0)


Transform = Annotated[SmoothQuant | Awq | Quadapter, Field(discriminator="name")]


class Training(Strict):
    """What every training of rounded weights has.

    ``steps`` updates of ``batch_size`` sequences of ``length`` tokens, by AdamW with a rate that falls as a cosine.
    ``sam_rho`` is how far sharpness-aware steps look, 0 for plain ones. The held-out loss is taken every ``eval_steps``
    steps; after ``patience`` looks without a better one training stops. ``micro_batch_size`` rows are run at a time and
    their gradients added up (None: as many as 256 MiB of logits hold); ``gradient_checkpointing`` computes activations twice
    instead of keeping them. A ``seed`` that is left out is the command's.
    """

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=8, ge=1)
    length: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=5e-5, gt=0)
    sam_rho: float = Field(default=0.0, ge=0)
    eval_steps: int = Field(default=20, ge=1)
    patience: int = Field(default=5, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0)

    def micro_batch(self, length: int, vocabulary: int) -> int:
        """How many rows of that length are run at a time, if there are as many."""
        return self.micro_batch_size or max(1, _LOGIT_BYTES // (4 * length * vocabulary))


class OnText(Training):
    """Training on the calibration set.

    ``objective``: give what the original model gives ("teacher"), or predict the set's next tokens ("text").
    """

    objective: Literal["teacher", "text"] = "teacher"


class Qat(OnText):
    """Quantization-aware training: weights, scales and ranges."""

    name: Literal["qat"]


class EndToEnd(OnText):
    """Quadapter's second phase: the channel scales of all blocks together, and static ranges."""

    name: Literal["quadapter"]
    learning_rate: float = Field(default=2e-3, gt=0)
    objective: Literal["teacher", "text"] = "text"


class Zsaq(Training):
    """ZSAQ: the original model is followed on what a generator makes up to tell the two apart; no data.

    ``generator``: a language model's folder; left out, the model itself. ``inputs`` "random" takes random tokens
    instead of a generator's. ``generator_learning_rate`` 0 freezes it. ``temperature`` is that of the softmax between
    a generator of the same vocabulary and the model's embeddings.
    """

    name: Literal["zsaq"]
    sam_rho: float = Field(default=0.05, ge=0)
    inputs: Literal["generator", "random"] = "generator"
    generator: str | None = None
    generator_learning_rate: float = Field(default=1e-5, ge=0)
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _generated(self) -> "Zsaq":
        about = ("generator", "generator_learning_rate", "temperature")
        defaults = {name: Zsaq.model_fields[name].default for name in about}
        if self.inputs == "random" and defaults != self.model_dump(include=set(about)):
            raise ValueError(f"random inputs need no generator: leave {', '.join(about)} out")
        return self
