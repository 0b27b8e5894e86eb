"""The public functions: what a notebook types. Each glues rooms together and holds no algorithm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import BUILTIN, Corpus
from calibrant.calibration.selection.uniform import select_uniform
from calibrant.calibration.sources.self_calibration import TemperatureSchedule, generate_self_calibration
from calibrant.calibration.sources.vocabulary import draw_vocabulary
from calibrant.calibration.tokenizer import Tokenizer
from calibrant.calibration.windows import Policy
from calibrant.compression.plan import Estimate, Plan, estimate, make_plan
from calibrant.compression.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from calibrant.compression.run import RunReport, Settings, run_compression
from calibrant.errors import CalibrantError, first_line
from calibrant.evaluation.divergence import Evaluation, evaluate_models
from calibrant.evaluation.windows import evaluation_windows
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import find_blocks
from calibrant.output_folder import check_output
from calibrant.progress import Progress, Silent

# A set this size is what the papers' main settings reduce to on a laptop: their 128 sequences, a quarter of the length.
DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 512
# Processor features that multiply bfloat16 faster than float32 (x86 twice, Arm).
_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def generate(
    model: str | Path,
    *,
    strategy: str = "self",
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    draw: int = 0,
    temperature: TemperatureSchedule | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> CalibrationSet:
    """Make a calibration set without a corpus: ``strategy`` "self" (the model writes it) or "vocabulary".

    ``draw`` numbers independent sets of one seed. ``length`` may not exceed the model's context; left out, it is 512 or
    the context, whichever is shorter.

    Raises:
        CalibrantError: the model folder or an option does not fit.
    """
    folder = ModelFolder(model_path(model))
    length = length if length is not None else _default_length(folder)
    _check_size(samples, length, seed, draw)
    _check_length(folder, length)
    tokenizer = Tokenizer(folder.path)
    if strategy == "vocabulary":
        return draw_vocabulary(tokenizer, samples=samples, length=length, seed=seed, draw=draw)
    if strategy != "self":
        raise CalibrantError(f"{strategy}: no source of that name; there are self, vocabulary")
    if batch_size < 1:
        raise CalibrantError(f"batch size {batch_size}: must be at least 1")
    return generate_self_calibration(
        _load_whole(folder, device, dtype),
        tokenizer,
        samples=samples,
        length=length,
        seed=seed,
        draw=draw,
        schedule=temperature or TemperatureSchedule(),
        batch_size=batch_size,
        progress=progress or Silent(),
        provenance=folder.identity(),
    )


def select(
    corpus: Corpus | str | Path,
    *,
    tokenizer: str | Path,
    strategy: str = "uniform",
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    draw: int = 0,
    windows: Policy = "pack",
    progress: Progress | None = None,
) -> CalibrationSet:
    """Pick a calibration set out of a corpus; ``tokenizer`` is a folder. Draw k of a seed shares no window with draw j.

    Raises:
        CalibrantError: the corpus cannot be read, is empty or too small.
    """
    _check_size(samples, length, seed, draw)
    if strategy != "uniform":
        raise CalibrantError(f"{strategy}: no selection of that name; there is uniform")
    if windows not in ("pack", "window"):
        raise CalibrantError(f"{windows}: no way to cut windows of that name; there are pack, window")
    source = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    return select_uniform(
        source,
        Tokenizer(model_path(tokenizer)),
        samples=samples,
        length=length,
        seed=seed,
        draw=draw,
        policy=windows,
        progress=progress or Silent(),
    )


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
        length = length if length is not None else _default_length(self.model.folder)
        _check_size(samples, length, 0, 0)
        _check_length(self.model.folder, length)
        return estimate(self.model, self.plan, samples, length, self.settings.dtype)

    def run(self, calibration: CalibrationSet | None, progress: Progress) -> RunReport:
        """Compress."""
        return run_compression(self.model, self.plan, calibration, self.output, self.settings, progress)


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
    overwrite: bool = False,
    allow_encoder: bool = False,
) -> PreparedRun:
    """Check everything a compression needs, without reading a weight.

    Raises:
        CalibrantError: model, recipe, set or output do not fit.
    """
    target = check_output(output, overwrite, [model])
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = ModelFolder(model_path(model), allow_encoder)
    if calibration is not None and chosen.needs_data:
        _check_calibration(folder, calibration)
    place = _device(device)
    lazy = LazyModel(folder, folder.dtype, place)
    plan = make_plan(lazy, find_blocks(lazy.module), chosen)
    settings = Settings(_dtype(dtype, place), place, sequential, propagate, overwrite=overwrite)
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
    overwrite: bool = False,
    allow_encoder: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Compress a model folder into ``output``.

    ``recipe`` is a built-in name, a YAML file or a ``Recipe``; ``calibration`` a set or its folder. Without one, a
    method that needs data gets a set the model writes itself (``generate`` with ``seed``). ``dtype`` is what is
    computed in: "bfloat16", "float32", or "auto" (bfloat16 where the processor multiplies it fast). ``sequential``
    and ``propagate`` are described in ``Settings``.

    Raises:
        CalibrantError: something does not fit, or the output cannot be written; nothing is left behind.
    """
    listener: Progress = progress or Silent()
    check_output(output, overwrite, [place for place in (calibration, recipe) if isinstance(place, str | Path)])
    given = CalibrationSet.load(calibration) if isinstance(calibration, str | Path) else calibration
    prepared = prepare(
        model,
        output=output,
        recipe=recipe,
        calibration=given,
        device=device,
        dtype=dtype,
        sequential=sequential,
        propagate=propagate,
        overwrite=overwrite,
        allow_encoder=allow_encoder,
    )
    needs_data = prepared.plan.recipe.needs_data
    if given is None and needs_data:
        given = generate(prepared.model.folder.path, seed=seed, device=device, dtype=dtype, progress=listener)
    return prepared.run(given if needs_data else None, listener)


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
    _check_length(folder, length)
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
    loaded = _load_whole(folder, device, dtype)
    original = _load_whole(reference, device, dtype) if reference is not None else None
    return evaluate_models(loaded, original, found, progress or Silent())


def _check_size(samples: int, length: int, seed: int, draw: int) -> None:
    if samples < 1 or length < 2 or draw < 0 or seed < 0:
        raise CalibrantError(
            f"{samples} samples of {length} tokens, seed {seed}, draw {draw}: "
            "need at least 1 sample of 2 tokens, and a seed and draw of at least 0"
        )


def _default_length(folder: ModelFolder) -> int:
    return min(DEFAULT_LENGTH, folder.context_length or DEFAULT_LENGTH)


def _check_length(folder: ModelFolder, length: int) -> None:
    context = folder.context_length
    if context is not None and length > context:
        raise CalibrantError(
            f"{folder.path}: {length} tokens are more than the model's context of {context}; use --length {context}"
        )


def _check_calibration(folder: ModelFolder, calibration: CalibrationSet) -> None:
    _check_length(folder, calibration.tokens.shape[1])
    tokenizer = Tokenizer(folder.path)
    if calibration.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise CalibrantError(
            f"the calibration set was made with another tokenizer than {folder.path}'s "
            f"({calibration.manifest.tokenizer_sha256[:12]} instead of {tokenizer.sha256[:12]}); "
            "make it again for this model"
        )
    vocabulary = folder.vocabulary
    if int(calibration.tokens.max()) >= vocabulary or int(calibration.tokens.min()) < 0:
        raise CalibrantError(f"the calibration set holds token ids outside {folder.path}'s vocabulary of {vocabulary}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CalibrantError(f"{name}: no such device; there are cpu and cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise CalibrantError(f"{name}: no such device; there are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CalibrantError(f"{name}: this machine has no CUDA device that torch can use; use --device cpu")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        units = torch.cpu.get_capabilities()
        fast = device.type == "cuda" or any(units.get(unit) for unit in _BFLOAT16_UNITS)
        return torch.bfloat16 if fast else torch.float32
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise CalibrantError(f"{name}: no such dtype to compute in; there are auto, bfloat16, float32")
    return known[name]


def _unpacking(folder: ModelFolder) -> dict[str, Any]:
    """Packed weights are unpacked: transformers 5.23 fails to load asymmetric ones otherwise."""
    settings = folder.config_dict.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("format") != "pack-quantized":
        return {}
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


def _load_whole(folder: ModelFolder, device: str, dtype: str) -> transformers.PreTrainedModel:
    place = _device(device)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # typed by transformers for the model alone
    try:
        model, found = load(
            str(folder.path),
            dtype=_dtype(dtype, place),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_unpacking(folder),
        )
    except Exception as error:  # a config can fail in as many ways as transformers has models
        raise CalibrantError(f"{folder.path}: transformers cannot load it ({first_line(error)})") from error
    if found["missing_keys"]:
        # transformers fills them with random numbers.
        missing = min(found["missing_keys"])
        raise CalibrantError(f"{folder.path}: its files lack {missing}; copy or download it again")
    loaded: transformers.PreTrainedModel = model.to(device=place).eval()
    return loaded
