"""Distillation: scales and kept weights of a whole compressed model learn the original's logits.

As the second phase of EfficientQAT (arXiv 2407.11062), in which all blocks learn together after each has learned alone.
There the text is learned; here it is the original's distribution of every next token, and pruned weights learn too
(ours).
"""

from dataclasses import dataclass

import torch
import transformers

from calibrant.formats.quantized import Codes
from calibrant.journal import Journal
from calibrant.methods.training import OnText
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.dequantized_model import load_dequantized
from calibrant.modeling.linears import use_fast_linears
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import Progress
from calibrant.recipes.parts import Distillation
from calibrant.recipes.plan import Plan
from calibrant.training.solved_model import SolvedModel
from calibrant.training.student import Student
from calibrant.training.teacher import remembered
from calibrant.training.train_model import split_held_out, training_rows
from calibrant.training.train_steps import TextStep
from calibrant.training.training_loop import Trained, train

# Held-out losses are computed about so many times in an epoch (ours).
_EVALUATIONS = 2


@dataclass(frozen=True)
class Distilled:
    """What was learned: ``codes`` of quantized linears with new scales, ``weights`` of pruned ones, by full name."""

    codes: dict[str, Codes]
    weights: dict[str, torch.Tensor]
    training: Trained


def distil(
    original: ModelFolder,
    compressed: ModelFolder,
    plan: Plan,
    codes: dict[str, Codes],
    pruned: dict[str, torch.dtype],
    given: TokenRows,
    dtype: torch.dtype,
    device: torch.device,
    journal: Journal,
    progress: Progress,
) -> Distilled:
    """Train what ``compressed`` holds: scales of the linears in ``codes``, kept weights of those in ``pruned``.

    A share of the calibration set ``given`` is held out; the values of least divergence there are taken, those before
    training among them. Products are computed in ``dtype``.

    Raises:
        CalibrantError: the set is too small, or the training diverged.
        StoppedError: a signal asked to stop; ``journal`` has the state.
    """
    asked = plan.recipe.distillation
    assert asked is not None
    options = distillation_options(asked, *given.ids.shape)
    with torch.inference_mode(False), torch.enable_grad():
        watched, rest = split_held_out(given, options, original.causal, device)
        teacher = remembered(_loaded(original, dtype, device), original, [watched, rest], dtype, progress)
        model = _loaded(compressed, dtype, device)
        specs = {name: spec for name in codes if (spec := plan.target_of(name).spec) is not None}
        learner = SolvedModel(model, codes, specs, pruned, plan.target.value_dtype)
        student = Student(learner, teacher, options, watched, dtype, original.causal)
        done = train(TextStep(student, options, rest), options, journal, progress)
        with torch.no_grad():
            return Distilled(learner.codes(), learner.pruned(), done)


def _loaded(folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> transformers.PreTrainedModel:
    if folder.quantization is not None and not folder.decoded:
        # transformers leaves models of mixed widths packed until they run, in inference mode.
        model = load_dequantized(folder, device, torch.float32, exact=True)
    else:
        model = load_whole(folder, str(device), "float32")
    model.requires_grad_(False)
    model.config.use_cache = False
    use_fast_linears(model, dtype, device)
    return model


def distillation_options(asked: Distillation, rows: int, length: int) -> OnText:
    """The training of ``asked`` on a set of ``rows`` rows of ``length`` tokens."""
    trained = max(1, training_rows(rows))
    batch_size = min(asked.batch_size, trained)
    steps = -(-trained * asked.epochs // batch_size)
    return OnText(
        name="distillation",
        steps=steps,
        batch_size=batch_size,
        length=length,
        learning_rate=asked.learning_rate,
        eval_steps=-(-trained // (_EVALUATIONS * batch_size)),
        patience=steps,  # the rate falls to 0, and the best values may come last
        seed=asked.seed,
    )
