"""Methods that train rounded weights: their options in a recipe, what they need and what they cost.

The trainings themselves are in ``training/``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from calibrant.methods.method import LayerProblem, MethodBase, MethodOptions, Scheme
from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.rtn import round_layer

# Evaluating the held-out loss should cost little beside the steps between two evaluations (ours).
HELD_OUT_TOKENS = 4096
# Bytes of logits in memory at a time (ours).
LOGIT_BYTES = 2**28


class TrainingOptions(MethodOptions):
    """What every training of rounded weights has.

    ``steps`` updates of ``batch_size`` sequences of ``length`` tokens, by AdamW with a cosine schedule. ``sam_rho`` is
    the radius rho of sharpness-aware steps, 0 for plain steps. The held-out loss is evaluated every ``eval_steps``
    steps; training stops after ``patience`` evaluations without a better one. ``micro_batch_size`` rows run at a time
    and their gradients are added up (None: as many as 256 MiB of logits allow); ``gradient_checkpointing`` computes
    activations twice instead of keeping them. A ``seed`` that is left out is the run's.
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
        """Rows of ``length`` tokens that run at a time, where there are as many."""
        return self.micro_batch_size or max(1, LOGIT_BYTES // (4 * length * vocabulary))

    def flops(self, parameters: int, generator_parameters: int) -> float:
        """Work of the whole training; a backward pass costs two forward passes."""
        # With sharpness-aware steps student and teacher run twice per step.
        runs = 2 if self.sam_rho else 1
        return self._flops((3 + self.gradient_checkpointing) * runs + runs, parameters, generator_parameters)

    def _flops(self, passes: int, parameters: int, generator_work: int) -> float:
        evaluations = 2 * (1 + self.steps / self.eval_steps) * HELD_OUT_TOKENS
        work = passes * parameters + generator_work
        return 2.0 * (self.batch_size * self.length * self.steps * work + evaluations * parameters)


class OnText(TrainingOptions):
    """Training on the calibration set.

    ``objective``: follow the original model ("teacher"), or predict the set's next tokens ("text").
    """

    objective: Literal["teacher", "text"] = "teacher"


class Qat(OnText):
    """Quantization-aware training: weights, scales and ranges."""

    name: Literal["qat"] = "qat"


class QuadapterEndToEnd(OnText):
    """Quadapter's second phase (arXiv 2211.16912): the channel scales of all blocks together, and static ranges."""

    name: Literal["quadapter"] = "quadapter"
    learning_rate: float = Field(default=2e-3, gt=0)
    # Sharpness is measured in weights, which this phase does not train.
    sam_rho: float = Field(default=0.0, ge=0, le=0)
    objective: Literal["teacher", "text"] = "text"


class Zsaq(TrainingOptions):
    """ZSAQ (arXiv 2310.13315): follow the original model on what a generator writes to tell the two apart; no data.

    ``generator``: a language model's folder; left out, the model itself. ``inputs`` "random" takes random tokens
    instead. ``generator_learning_rate`` 0 freezes the generator. ``temperature`` is that of the softmax between a
    generator of the same vocabulary and the model's embeddings.
    """

    name: Literal["zsaq"] = "zsaq"
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

    def flops(self, parameters: int, generator_parameters: int) -> float:
        """Work of the whole training, the generator's step included."""
        runs = 2 if self.sam_rho else 1
        passes, generator_passes = (3 + self.gradient_checkpointing) * runs + 1, 1
        if self.generator_learning_rate:
            # The generator's step goes through student and teacher and back to their inputs.
            passes, generator_passes = passes + 4, 4
        return self._flops(passes, parameters, generator_passes * generator_parameters)


@dataclass(frozen=True)
class Trainer(MethodBase):
    """A method that trains rounded weights; the result is rounded to nearest on the learned grids.

    ``needs_data``: whether it trains on the calibration set. ``continues_quadapter``: whether it continues from the
    scales that the transform quadapter learned.
    """

    changes_shape: ClassVar[bool] = False
    statistic: ClassVar[None] = None
    needs_data: bool = True
    continues_quadapter: bool = False

    def refusal(self, scheme: Scheme, *, by_layer: bool) -> str | None:
        """Why the method cannot make such a result, or None."""
        weights, activations = scheme.weights, scheme.activations
        searches = ("none",) if self.continues_quadapter else ("none", "mse")
        if weights is None or scheme.sparsity is not None or weights.range_search not in searches:
            return f"{self.name} trains rounded weights: the scheme needs weights with range_search " + " or ".join(
                searches
            )
        if weights.signed_scales:
            return f"{self.name} learns its ranges, whose scales are positive: leave signed_scales out"
        if weights.type != "int" or (activations is not None and activations.type != "int8"):
            return f"{self.name} trains integers: leave the types of weights and activations out"
        if activations is None or activations.dynamic:
            return None
        if not self.needs_data:
            return f"{self.name} has no data to choose static ranges from: leave dynamic: false out"
        if activations.range != "minmax":
            return f"{self.name} learns static ranges from the minimum and maximum: leave range out"
        return None

    def solve(self, _: Any, problem: LayerProblem) -> Solution:
        """Round to nearest, for what training leaves as floating-point weights."""
        return round_layer(problem)

    def without_data(self, problem: LayerProblem) -> Solution:
        """The same: training has used the data already."""
        return round_layer(problem)

    def stored_dense(self, _: Any) -> bool:
        """Never: the result lies on plain grids."""
        return False

    def passes(self, _: Any) -> float:
        """None: after training, weights are only rounded."""
        return 0.0


QAT = Trainer(Qat)
QUADAPTER_END_TO_END = Trainer(QuadapterEndToEnd, continues_quadapter=True)
ZSAQ = Trainer(Zsaq, needs_data=False)
