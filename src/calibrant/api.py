"""The public functions: what a notebook types. Each glues rooms together and holds no algorithm."""

from dataclasses import dataclass
from pathlib import Path

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import BUILTIN, Corpus
from calibrant.calibration.generate import DEFAULT_LENGTH, check_length, check_size, default_length, generate
from calibrant.calibration.sources.vocabulary import draw_vocabulary
from calibrant.engine.importance import input_squares
from calibrant.engine.two_stage_pruning import check_structure
from calibrant.errors import CalibrantError
from calibrant.evaluation.comparison import Evaluation, evaluate_models
from calibrant.evaluation.text import evaluation_windows
from calibrant.formats.imatrix import gguf_names, write_imatrix
from calibrant.formats.quantized import FormatName
from calibrant.formats.registry import FORMATS
from calibrant.methods.registry import METHODS
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import find_blocks
from calibrant.modeling.tokenizer import Tokenizer, tokenizer_files_sha256
from calibrant.modeling.whole_model import load_whole, torch_device, torch_dtype
from calibrant.output_folder import check_output, whole_file
from calibrant.pipeline.estimate import Estimate, estimate
from calibrant.pipeline.record import RunReport, Settings, training_identity
from calibrant.pipeline.run import run_compression
from calibrant.progress import NoProgress, Progress
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.parts import Zsaq
from calibrant.recipes.plan import Plan
from calibrant.recipes.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from calibrant.training.journal import check_same_training, is_unfinished
from calibrant.training.train_model import check_training

_WATCHED_ROWS = 16


@dataclass(frozen=True)
class PreparedRun:
    """A compression that was checked and can be estimated or run."""

    model: LazyModel
    plan: Plan
    settings: Settings
    output: Path

    def estimate(self, samples: int, length: int | None) -> Estimate:
        """Seconds, memory and disk of the run with a set of that size (None: the default length), roughly.

        Raises:
            CalibrantError: such a set could not be made for this model.
        """
        length = length if length is not None else default_length(self.model.folder)
        check_size(samples, length, 0, 0)
        check_length(self.model.folder, length)
        return estimate(self.model, self.plan, samples, length, self.settings.dtype)

    def run(self, calibration: CalibrationSet | None, progress: Progress) -> RunReport:
        """Compress."""
        training = self.plan.recipe.training
        if isinstance(training, Zsaq):
            calibration = self._watched(training, progress)
        return run_compression(self.model, self.plan, calibration, self.output, self.settings, progress)

    def _watched(self, training: Zsaq, progress: Progress) -> CalibrationSet:
        """What a training without data is watched on: text the model writes, or random tokens if it writes none."""
        folder = self.model.folder
        samples, length, seed = _WATCHED_ROWS, training.length, training.seed
        if not folder.causal:
            return draw_vocabulary(Tokenizer(folder.path), samples=samples, length=length, seed=seed, draw=0)
        return generate(
            folder.path,
            samples=samples,
            length=length,
            seed=seed,
            device=str(self.settings.device),
            dtype=str(self.settings.dtype).removeprefix("torch."),
            progress=progress,
        )


def prepare(
    model: str | Path,
    *,
    output: str | Path,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    calibration: CalibrationSet | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    sequential: bool = True,
    propagate: bool = True,
    checkpoint_format: FormatName = "compressed-tensors",
    overwrite: bool = False,
    allow_encoder: bool = False,
) -> PreparedRun:
    """Check everything a compression needs, without reading a weight; for 2SSP those of one block.

    Raises:
        CalibrantError: model, recipe, set or output do not fit.
    """
    target = check_output(output, overwrite, [model])
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = ModelFolder(model_path(model), allow_encoder)
    made_by = folder.made_by()
    if made_by is not None and made_by.quantized:
        raise CalibrantError(
            f"{folder.path}: {made_by.recipe} quantized the model already; start from its original weights"
        )
    if calibration is not None and chosen.needs_data:
        _check_calibration(folder, calibration)
    if chosen.training is not None:
        check_training(folder, chosen.training)
    if calibration is None and chosen.needs_data and not folder.causal:
        raise CalibrantError(f"{folder.path}: writes no text, so it makes no calibration set; pass one (--calibration)")
    goes_on = chosen.learns and is_unfinished(target) and not overwrite
    if chosen.drift_correction and not (sequential and propagate):
        raise CalibrantError(f"recipe {chosen.name} needs the single pass: leave out --two-pass and --no-propagate")
    place = torch_device(device)
    lazy = LazyModel(folder, folder.dtype, place)
    if checkpoint_format not in FORMATS:
        raise CalibrantError(f"{checkpoint_format}: no such format; there are {', '.join(FORMATS)}")
    plan = make_plan(lazy, find_blocks(lazy.module), chosen, checkpoint_format)
    if METHODS[chosen.method.name].changes_shape:
        check_structure(lazy, plan)
    settings = Settings(torch_dtype(dtype, place), place, sequential, propagate, overwrite=overwrite)
    if goes_on:
        check_same_training(target, training_identity(lazy, plan, calibration if chosen.needs_data else None, settings))
    return PreparedRun(lazy, plan, settings, target)


def compress(
    model: str | Path,
    *,
    output: str | Path,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    calibration: CalibrationSet | str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    sequential: bool = True,
    propagate: bool = True,
    checkpoint_format: FormatName = "compressed-tensors",
    overwrite: bool = False,
    allow_encoder: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Compress a model folder into ``output``.

    ``recipe`` is a built-in name, a YAML file or a ``Recipe``; ``calibration`` a set or its folder. Without one, a
    method that needs data gets a set the model writes itself (``generate`` with ``seed``, which is also that of a
    training whose recipe says none). ``dtype`` is what is computed in: "bfloat16", "float32", or "auto" (bfloat16
    where the processor multiplies it fast). ``sequential`` and ``propagate`` are described in ``Settings``.
    ``checkpoint_format``: "compressed-tensors", "gptq" or "awq".

    Raises:
        CalibrantError: something does not fit, or the output cannot be written; nothing is left behind.
    """
    listener: Progress = progress or NoProgress()
    check_output(output, overwrite, [place for place in (calibration, recipe) if isinstance(place, str | Path)])
    given = CalibrationSet.load(calibration) if isinstance(calibration, str | Path) else calibration
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    prepared = prepare(
        model,
        output=output,
        recipe=chosen.with_seed(seed),
        calibration=given,
        device=device,
        dtype=dtype,
        sequential=sequential,
        propagate=propagate,
        checkpoint_format=checkpoint_format,
        overwrite=overwrite,
        allow_encoder=allow_encoder,
    )
    needs_data = prepared.plan.recipe.needs_data
    if given is None and needs_data:
        given = generate(prepared.model.folder.path, seed=seed, device=device, dtype=dtype, progress=listener)
    return prepared.run(given if needs_data else None, listener)


def write_importance_matrix(
    model: str | Path,
    *,
    calibration: CalibrationSet | str | Path,
    output: str | Path,
    device: str = "cpu",
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write llama.cpp's importance matrix of ``model`` on a calibration set, a GGUF file; returns its number of layers.

    Raises:
        CalibrantError: model or set do not fit, or llama.cpp has no name for a layer.
    """
    target = Path(output)
    if target.exists() and (not overwrite or target.is_dir()):
        raise CalibrantError(f"{target}: exists; choose another file or pass --overwrite")
    given = calibration if isinstance(calibration, CalibrationSet) else CalibrationSet.load(calibration)
    folder = ModelFolder(model_path(model))
    _check_calibration(folder, given)
    place = torch_device(device)
    lazy = LazyModel(folder, torch_dtype(dtype, place), place)
    blocks = find_blocks(lazy.module)
    sums = input_squares(lazy, blocks, given, progress or NoProgress())
    names = gguf_names(folder.config.get_text_config().model_type, len(blocks), list(sums))
    named = {name: both for module, both in sums.items() for name in names[module]}
    rows, length = given.tokens.shape
    with whole_file(target) as beside:
        write_imatrix(beside, named, [f"calibrant:sha256:{given.sha256}"], rows, length)
    return len(named)


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | Corpus = BUILTIN,
    length: int = DEFAULT_LENGTH,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of ``model`` on fixed windows of ``text`` and, with ``against``, its divergence from that model.

    ``limit`` uses the first windows only. Models are loaded by transformers, whole.

    Raises:
        CalibrantError: a model or the text does not fit.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise CalibrantError(
            f"length {length}, limit {limit}: need windows of at least 2 tokens, and at least 1 window"
        )
    folder = ModelFolder(model_path(model), allow_quantized=True)
    check_length(folder, length)
    tokenizer = Tokenizer(folder.path)
    reference = None
    if against is not None:
        reference = ModelFolder(model_path(against), allow_quantized=True)
        same = Tokenizer(reference.path).sha256 == tokenizer.sha256 and reference.vocabulary == folder.vocabulary
        if not same:
            raise CalibrantError(
                f"{against}: its tokenizer or vocabulary differs from {model}'s, so they cannot be compared"
            )
    corpus = text if isinstance(text, Corpus) else Corpus(text)
    found = evaluation_windows(corpus, tokenizer, length, limit)
    if int(found.windows.max()) >= folder.vocabulary:
        raise CalibrantError(
            f"{folder.path}: its tokenizer gives ids beyond the model's vocabulary of {folder.vocabulary}"
        )
    loaded = load_whole(folder, device, dtype)
    original = load_whole(reference, device, dtype) if reference is not None else None
    return evaluate_models(loaded, original, found, progress or NoProgress())


def _check_calibration(folder: ModelFolder, calibration: CalibrationSet) -> None:
    check_length(folder, calibration.tokens.shape[1])
    manifest = calibration.manifest
    # A large tokenizer takes seconds to read.
    known = manifest.tokenizer_files_sha256
    if known is None or known != tokenizer_files_sha256(folder.path):
        tokenizer = Tokenizer(folder.path)
        # Sets of given token ids may not name their tokenizer.
        if manifest.tokenizer_sha256 not in ("", tokenizer.sha256):
            raise CalibrantError(
                f"the calibration set was made with another tokenizer than {folder.path}'s "
                f"({manifest.tokenizer_sha256[:12]} instead of {tokenizer.sha256[:12]}); make it again for this model"
            )
    vocabulary = folder.vocabulary
    if int(calibration.tokens.max()) >= vocabulary or int(calibration.tokens.min()) < 0:
        raise CalibrantError(f"the calibration set holds token ids outside {folder.path}'s vocabulary of {vocabulary}")
