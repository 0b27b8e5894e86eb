"""Runs a recipe's training: sets up models, data and journal, and adds the learned values to the plan."""

import copy
from dataclasses import replace
from functools import partial

import torch
import transformers
from torch.utils.checkpoint import checkpoint

from calibrant.errors import CalibrantError
from calibrant.journal import Journal
from calibrant.methods.training import HELD_OUT_TOKENS, OnText, QuadapterEndToEnd, TrainingOptions, Zsaq
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import Progress
from calibrant.recipes.plan import Plan
from calibrant.training.generator import Generator, read_embeddings
from calibrant.training.learned_range import see_inputs
from calibrant.training.rounded_model import RoundedModel
from calibrant.training.scaled_model import PlacedPair, ScaledModel
from calibrant.training.student import Student
from calibrant.training.teacher import WholeTeacher
from calibrant.training.train_steps import TextStep, ZsaqStep
from calibrant.training.training_loop import Trained, TrainStep, train

# One row in ``_HELD_OUT`` of a calibration set is held out (ours).
_HELD_OUT = 8


def train_model(
    folder: ModelFolder,
    plan: Plan,
    places: list[PlacedPair],
    given: TokenRows,
    dtype: torch.dtype,
    device: torch.device,
    journal: Journal,
    progress: Progress,
) -> tuple[Plan, Trained]:
    """Train, and return the plan with the learned linears, or scales at ``places``, and static ranges.

    A share of the calibration set ``given`` is held out and the rest trained on; with ``Zsaq`` all of it is held out.

    Raises:
        CalibrantError: the set is too small, a model does not fit, or the training diverged.
    """
    options = plan.recipe.training
    assert options is not None
    with torch.inference_mode(False), torch.enable_grad():
        teacher = load_whole(folder, str(device), "float32").requires_grad_(False)
        teacher.config.use_cache = False
        watched, rest = split_held_out(given, options, folder.causal, device)
        activations, seen = plan.recipe.scheme.activations, None
        if activations is not None and activations.observed:
            split = (values.split(options.batch_size) for values in rest)
            batches = (TokenRows(*both) for both in zip(*split, strict=True))
            seen = see_inputs(teacher, list(plan.linears), batches, folder.causal)
        # Parameters that training does not change are shared with the teacher.
        changed = {f"{name}.weight" for name in plan.linears if not isinstance(options, QuadapterEndToEnd)}
        shared = {id(value): value for name, value in teacher.named_parameters() if name not in changed}
        copied = copy.deepcopy(teacher, shared)
        learner: RoundedModel | ScaledModel
        if isinstance(options, QuadapterEndToEnd):
            learner = ScaledModel(copied, plan, places, seen)
            if not any(parameters for parameters, _ in learner.groups):
                raise CalibrantError(
                    "quadapter's training has nothing to learn: no norm takes scales, and no range is static"
                )
        else:
            learner = RoundedModel(copied, plan, seen)
        if options.gradient_checkpointing:
            for name in plan.blocks:
                block = copied.get_submodule(name)
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        student = Student(learner, WholeTeacher(teacher, dtype), options, watched, dtype, folder.causal)
        step: TrainStep
        if isinstance(options, Zsaq):
            step = zsaq_step(folder, student, teacher, options, device)
        else:
            assert isinstance(options, OnText)
            step = TextStep(student, options, rest)
        done = train(step, options, journal, progress)
        learned = replace(plan.learned, input_grids=learner.input_grids())
        if isinstance(learner, ScaledModel):
            learned = replace(learned, scales=learner.scales())
        else:
            learned = replace(learned, weights=learner.trained())
        return replace(plan, learned=learned), done


def check_training(folder: ModelFolder, options: TrainingOptions) -> None:
    """Check that the model in ``folder`` can be trained with ``options``.

    Raises:
        CalibrantError: the model, the generator or the training's length does not fit.
    """
    sources = [folder]
    if isinstance(options, OnText) and options.objective == "text" and not folder.causal:
        raise CalibrantError(f"{folder.path}: predicts no next tokens; take objective: teacher")
    if isinstance(options, Zsaq) and options.inputs == "generator":
        if options.generator is None and not folder.causal:
            raise CalibrantError(
                f"{folder.path}: writes no text, so it cannot be its own generator; name a language model's folder as "
                "generator of the method, or take inputs: random"
            )
        sources.append(_generator_folder(folder, options))
    for source in sources if isinstance(options, Zsaq) else ():
        longest = source.context_length
        if longest is not None and options.length > longest:
            raise CalibrantError(
                f"{options.name}, length {options.length}: {source.path} reads {longest} tokens at most"
            )


def generator_identity(folder: ModelFolder, options: TrainingOptions) -> dict[str, str] | None:
    """Identity of the generator's folder; None if the generator is the model itself or there is none."""
    if isinstance(options, Zsaq) and options.generator is not None:
        return _generator_folder(folder, options).identity
    return None


def _generator_folder(folder: ModelFolder, options: Zsaq) -> ModelFolder:
    return folder if options.generator is None else ModelFolder(model_path(options.generator))


def split_held_out(
    given: TokenRows, options: TrainingOptions, causal: bool, device: torch.device
) -> tuple[TokenRows, TokenRows]:
    """Held-out and training rows, cut to the training's length; with ZSAQ all rows are held out.

    Raises:
        CalibrantError: there are fewer than two rows, or no counted tokens in one of the parts.
    """
    tokens, counted = given.ids.long().to(device), given.counted.to(device)
    last = 0
    if not isinstance(options, Zsaq):
        if len(tokens) < 2:
            raise CalibrantError("training needs a calibration set of at least two rows, one of them to be held out")
        last = training_rows(len(tokens))
    text = isinstance(options, OnText) and options.objective == "text"
    # Never split a classifier's inputs.
    length = min(options.length, tokens.shape[1]) if causal else tokens.shape[1]
    held_out = _cut(TokenRows(tokens[last:], counted[last:]), length, text)
    most = max(1, HELD_OUT_TOKENS // length)
    return TokenRows(*(values[:most] for values in held_out)), _cut(
        TokenRows(tokens[:last], counted[:last]), length, text
    )


def training_rows(rows: int) -> int:
    """How many of a calibration set's ``rows`` are trained on; the rest is held out."""
    return rows - max(1, rows // _HELD_OUT)


def _cut(rows: TokenRows, length: int, text: bool) -> TokenRows:
    """Cut rows into pieces of ``length`` without the remainder; drop pieces without a token to learn from."""
    tokens, counted = rows
    whole = tokens.shape[1] // length * length
    tokens, counted = tokens[:, :whole].reshape(-1, length), counted[:, :whole].reshape(-1, length)
    some = (counted[:, 1:] if text else counted).any(1)
    if len(tokens) and not bool(some.any()):
        raise CalibrantError("training needs tokens that count, and a part of the calibration set has none")
    return TokenRows(tokens[some], counted[some])


def zsaq_step(
    folder: ModelFolder, student: Student, teacher: transformers.PreTrainedModel, options: Zsaq, device: torch.device
) -> ZsaqStep:
    tokenizer = Tokenizer(folder.path)
    special = tokenizer.special_ids
    known = [index for index in range(min(tokenizer.size, folder.vocabulary)) if index not in special]
    eligible = torch.tensor(known, device=device)
    if options.inputs == "random":
        return ZsaqStep(student, options, eligible, None)
    source = _generator_folder(folder, options)
    writer = load_whole(source, str(device), "float32").requires_grad_(False)
    embeddings = read_embeddings(teacher)
    same = source is folder or (
        Tokenizer(source.path).sha256 == tokenizer.sha256 and source.vocabulary == len(embeddings)
    )
    generator = Generator(
        writer,
        embeddings,
        same,
        options.temperature,
        options.seed,
    )
    if not same:
        # Seeds come from the generator's own vocabulary.
        eligible = torch.arange(generator.vocabulary, device=device)
    return ZsaqStep(student, options, eligible, generator)
