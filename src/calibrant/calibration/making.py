"""From names of models and corpora to calibration sets: generate, select, and rebuild what was made before."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import transformers
from pydantic import ValidationError

from calibrant.calibration.calibration_set import MANIFEST_NAME, CalibrationSet, Manifest
from calibrant.calibration.corpus import BUILTIN, Corpus
from calibrant.calibration.selection.request import (
    LEXICAL,
    FilterRequest,
    MixRequest,
    SelectionRequest,
    Strategy,
    selection_request,
)
from calibrant.calibration.selection.selecting import WITH_MODEL, select_from
from calibrant.calibration.sources.other_models_text import generate_from_prefixes, generate_llm_qat
from calibrant.calibration.sources.self_calibration import (
    FirstTokens,
    TemperatureSchedule,
    generate_self_calibration,
)
from calibrant.calibration.sources.vocabulary import draw_vocabulary
from calibrant.calibration.windows import Policy
from calibrant.errors import CalibrantError, first_line
from calibrant.executors import Executor, ExecutorName, LocalExecutor, make_executor
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import NoProgress, Progress
from calibrant.version import __version__

# A set this size is what the papers' main settings reduce to on a laptop: their 128 sequences, a quarter of the length.
DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 512
DEFAULT_PERCENTILE = 80.0
_SOURCES = ("self", "llm-qat", "prefix", "vocabulary")
_LIBRARIES = ("numpy", "tokenizers", "torch", "transformers")


def generate(
    model: str | Path,
    *,
    strategy: str = "self",
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    draw: int = 0,
    temperature: TemperatureSchedule | None = None,
    first_tokens: FirstTokens = "any",
    corpus: Corpus | str | Path | None = None,
    percentile: float = DEFAULT_PERCENTILE,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> CalibrationSet:
    """Make a calibration set that a model writes, or of random tokens.

    ``strategy``: "self" (the model writes from BOS alone, by ``temperature`` and ``first_tokens``), "llm-qat" (from
    random tokens), "prefix" (from the beginnings of ``corpus``, keeping rows below ``percentile`` of perplexity) or
    "vocabulary". ``draw`` numbers independent sets of one seed. ``length`` may not exceed the model's context; left
    out, it is 512 or the context, whichever is shorter.

    Raises:
        CalibrantError: the model folder, the corpus or an option does not fit.
    """
    folder = ModelFolder(model_path(model))
    length = length if length is not None else default_length(folder)
    check_size(samples, length, seed, draw)
    check_length(folder, length)
    tokenizer = Tokenizer(folder.path)
    if strategy not in _SOURCES:
        raise CalibrantError(f"{strategy}: no source of that name; there are {', '.join(_SOURCES)}")
    if batch_size < 1:
        raise CalibrantError(f"batch size {batch_size}: must be at least 1")
    if first_tokens not in ("any", "english"):
        raise CalibrantError(f"{first_tokens}: no such first tokens; there are any, english")
    if not 0 < percentile <= 100:
        raise CalibrantError(f"percentile {percentile:g}: must be above 0 and at most 100")
    if strategy == "prefix" and corpus is None:
        raise CalibrantError("prefix continues the beginnings of a corpus's texts: name one with --corpus")
    if strategy != "prefix" and corpus is not None:
        raise CalibrantError(f"{strategy} reads no corpus: leave --corpus out, or take --strategy prefix")
    if strategy != "self" and (temperature is not None or first_tokens != "any"):
        raise CalibrantError(f"temperatures and first tokens are for --strategy self, not for {strategy}")
    if strategy != "prefix" and percentile != DEFAULT_PERCENTILE:
        raise CalibrantError(f"--percentile is for --strategy prefix, not for {strategy}")
    size: dict[str, int] = {"samples": samples, "length": length, "seed": seed, "draw": draw}
    if strategy == "vocabulary":
        return _located(draw_vocabulary(tokenizer, **size), str(model), [])
    common: dict[str, Any] = {
        **size,
        "batch_size": batch_size,
        "progress": progress or NoProgress(),
        "provenance": folder.identity(),
    }
    texts = corpus if corpus is None or isinstance(corpus, Corpus) else Corpus(corpus)
    loaded = load_whole(folder, device, dtype)
    if texts is not None:
        made = generate_from_prefixes(loaded, tokenizer, texts, percentile=percentile, **common)
        return _located(made, str(model), [texts.location])
    if strategy == "llm-qat":
        return _located(generate_llm_qat(loaded, tokenizer, **common), str(model), [])
    schedule = temperature or TemperatureSchedule()
    made = generate_self_calibration(loaded, tokenizer, schedule=schedule, first_tokens=first_tokens, **common)
    return _located(made, str(model), [])


def select(
    corpus: Corpus | str | Path | Sequence[Corpus | str | Path],
    *,
    tokenizer: str | Path,
    strategy: Strategy = "uniform",
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    draw: int = 0,
    windows: Policy = "pack",
    shards: int = 1,
    parts: int | None = None,
    executor: ExecutorName = "local",
    pool: int | None = None,
    keep: Literal["lowest", "middle", "below"] = "below",
    percentile: float = 80.0,
    embedding: str = LEXICAL,
    mask: Literal["all", "assistant", "no-special"] = "all",
    weights: Sequence[float] | None = None,
    mix: MixRequest | None = None,
    filters: FilterRequest | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> CalibrationSet:
    """Pick a calibration set out of one corpus or several; ``tokenizer`` is a model folder.

    ``strategy`` and the options that belong to it are described in ``SelectionRequest``. Draw k shares no window with
    draw j: "uniform" cuts them from one shuffle, strategies without chance see disjoint parts of the corpus
    (``shards``). "perplexity" and "cola" run the model of the tokenizer's folder over every candidate, on ``device`` in
    ``dtype``. Conversations go through the tokenizer's chat template; ``mask`` says which tokens count: "all", those an
    "assistant" wrote, or all but special ones ("no-special"). Several corpora share the samples by ``weights``, groups
    of a corpus's documents (scripts or lengths) by ``mix``. ``parts`` splits the work of "zipcal" into two rounds over
    random parts of the corpus, which ``executor`` "ray" runs on a cluster; left out, it is 1, or with Ray the cluster's
    number of processors.

    Raises:
        CalibrantError: a corpus cannot be read, is empty or too small, or the options do not fit.
    """
    if executor != "local" and strategy != "zipcal":
        raise CalibrantError(f"--executor {executor} runs the parts of zipcal; {strategy} runs here: leave it out")
    runner = make_executor(executor)
    request = selection_request(
        strategy=strategy,
        windows=windows,
        samples=samples,
        length=length,
        seed=seed,
        draw=draw,
        shards=shards,
        parts=parts if parts is not None else runner.slots,
        pool=pool,
        keep=keep,
        percentile=percentile,
        embedding=embedding,
        mask=mask,
        weights=None if weights is None else tuple(weights),
        mix=mix or MixRequest(),
        filters=filters or FilterRequest(),
    )
    given = [corpus] if isinstance(corpus, Corpus | str | Path) else list(corpus)
    if not given:
        raise CalibrantError("no corpus is given")
    corpora = [one if isinstance(one, Corpus) else Corpus(one) for one in given]
    return _run_selection(corpora, str(tokenizer), request, device, dtype, runner, progress or NoProgress())


def _run_selection(
    corpora: list[Corpus],
    model: str,
    request: SelectionRequest,
    device: str,
    dtype: str,
    executor: Executor,
    progress: Progress,
) -> CalibrationSet:
    path = model_path(model)
    scored: dict[str, Any] = {}

    def load_model() -> transformers.PreTrainedModel:
        folder = ModelFolder(path)
        check_length(folder, request.length)
        loaded = load_whole(folder, device, dtype)
        scored.update(folder.identity(), device=device, dtype=str(loaded.dtype).removeprefix("torch."))
        return loaded

    if request.strategy in WITH_MODEL:
        ModelFolder(path)
    made = select_from(corpora, str(path), request, load_model, executor, progress)
    if scored:
        made = CalibrationSet(made.tokens, made.mask, made.manifest.model_copy(update={"model": scored}))
    return _located(made, model, [corpus.location for corpus in corpora])


def _located(made: CalibrationSet, model: str, corpora: list[str]) -> CalibrationSet:
    """The set with what is needed to make it again: where its inputs were, which libraries were at work."""
    locations = {"model": [model], **({"corpora": corpora} if corpora else {})}
    manifest = made.manifest.model_copy(update={"locations": locations, "versions": _versions()})
    return CalibrationSet(made.tokens, made.mask, manifest)


def _versions() -> dict[str, str]:
    return {"calibrant": __version__, **{name: version(name) for name in _LIBRARIES}}


@dataclass(frozen=True)
class Rebuilt:
    """A set made again with the tokens its manifest names; ``changes`` are differences that did not matter."""

    calibration: CalibrationSet
    changes: list[str]


def rebuild(
    manifest: str | Path,
    *,
    model: str | Path | None = None,
    corpora: Sequence[str | Path] | None = None,
    leakage: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> Rebuilt:
    """Make a calibration set again from its manifest (the file, or the set's folder).

    The model, the corpora and the evaluation texts are looked for where the manifest says they were, or at ``model``,
    ``corpora`` and ``leakage``.

    Raises:
        CalibrantError: an input is missing, or the tokens come out differently; the message lists what changed.
    """
    wanted = read_manifest(manifest)
    if not wanted.locations.get("model"):
        raise CalibrantError(f"{manifest}: says not where its model was; it is from before sets could be rebuilt")
    place = str(model) if model is not None else wanted.locations["model"][0]
    places = [str(one) for one in corpora] if corpora is not None else wanted.locations.get("corpora", [])
    if len(places) != len(wanted.corpora):
        raise CalibrantError(f"{len(places)} corpora are given, the set was made from {len(wanted.corpora)}")
    if leakage is not None:
        wanted = _with_leakage_at(wanted, [str(one) for one in leakage])
    for what, option, where in (
        ("model", "--model", [place]),
        ("corpus", "--corpus", places),
        ("leakage", "--leakage", wanted.parameters.get("filters", {}).get("leakage", [])),
    ):
        for one in where:
            if one != BUILTIN and not one.startswith("hub:") and not Path(one).exists():
                raise CalibrantError(
                    f"{manifest}: its {what} {one} is not there (any more); name its place with {option}"
                )
    again = _generate_again if wanted.strategy in _SOURCES else _select_again
    made = again(wanted, place, places, progress or NoProgress())
    changes = _changes(wanted, made.manifest)
    if made.sha256 != wanted.set_sha256:
        what = "; ".join(changes) or "nothing that is recorded: the processor or its number of threads may differ"
        raise CalibrantError(
            f"{manifest}: the set cannot be made again, its tokens come out differently. Changed: {what}"
        )
    return Rebuilt(CalibrationSet(made.tokens, made.mask, wanted), changes)


def _with_leakage_at(wanted: Manifest, places: list[str]) -> Manifest:
    if len(places) != len(wanted.evaluations):
        raise CalibrantError(
            f"{len(places)} evaluation texts are given, the set was made with {len(wanted.evaluations)}"
        )
    filters = {**wanted.parameters["filters"], "leakage": places}
    return wanted.model_copy(update={"parameters": {**wanted.parameters, "filters": filters}})


def _select_again(wanted: Manifest, model: str, places: list[str], progress: Progress) -> CalibrationSet:
    fields = wanted.model_dump(include={"samples", "length", "seed", "draw", "strategy"})
    request = selection_request(**fields, **wanted.parameters)
    corpora = [
        Corpus(location, described.get("field", "text"))
        for location, described in zip(places, wanted.corpora, strict=True)
    ]
    scored = wanted.model or {}
    return _run_selection(
        corpora, model, request, scored.get("device", "cpu"), scored.get("dtype", "auto"), LocalExecutor(), progress
    )


def _generate_again(wanted: Manifest, model: str, places: list[str], progress: Progress) -> CalibrationSet:
    given = wanted.parameters
    options: dict[str, Any] = wanted.model_dump(include={"samples", "length", "seed", "draw", "strategy"})
    options |= {name: given[name] for name in ("first_tokens", "percentile", "batch_size", "device") if name in given}
    if "compute_dtype" in given:
        options["dtype"] = given["compute_dtype"]
    if "temperature_initial" in given:
        options["temperature"] = TemperatureSchedule(
            given["temperature_initial"], given["temperature_final"], given["temperature_steps"]
        )
    if places:
        options["corpus"] = Corpus(places[0], wanted.corpora[0].get("field", "text"))
    return generate(model, progress=progress, **options)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest at ``path``, a file or a set's folder.

    Raises:
        CalibrantError: there is none, or it is not one.
    """
    file = Path(path) / MANIFEST_NAME if Path(path).is_dir() else Path(path)
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        said = "keys are missing or wrong" if isinstance(error, ValidationError) else first_line(error)
        raise CalibrantError(f"{file}: not a calibration manifest ({said})") from error


def _changes(wanted: Manifest, made: Manifest) -> list[str]:
    """What of the inputs differs, a phrase each."""
    changes = []
    if wanted.tokenizer_sha256 != made.tokenizer_sha256:
        changes.append("the tokenizer")
    if wanted.chat_template_sha256 != made.chat_template_sha256:
        changes.append("the chat template")
    for name, value in (wanted.model or {}).items():
        if (made.model or {}).get(name) != value:
            changes.append(f"the model's {name.removesuffix('_sha256')}")
    for before, now in zip(wanted.corpora, made.corpora, strict=True):
        changes += _corpus_changes(before, now)
    for before, now in zip(wanted.evaluations, made.evaluations, strict=False):
        changes += [text.replace("corpus", "leakage", 1) for text in _corpus_changes(before, now)]
    if wanted.embedding_sha256 != made.embedding_sha256:
        changes.append("the sentence encoder")
    for library, number in wanted.versions.items():
        if made.versions.get(library) != number:
            changes.append(f"{library} {number} is now {made.versions.get(library)}")
    return changes


def _corpus_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    files, current = before.get("files"), now.get("files")
    if files is None or current is None:
        same = {**before, "rows": None} == {**now, "rows": None}
        return [] if same else [f"the corpus {before.get('name')}"]
    if len(files) == len(current) == 1:  # a single file may have another name
        return [] if list(files.values()) == list(current.values()) else [f"the corpus file {next(iter(files))}"]
    gone = [f"the corpus file {name} is gone" for name in files if name not in current]
    new = [f"the corpus file {name} is new" for name in current if name not in files]
    return gone + new + [f"the corpus file {n}" for n in files if n in current and files[n] != current[n]]


def check_size(samples: int, length: int, seed: int, draw: int) -> None:
    """Refuse sizes and seeds that make no set.

    Raises:
        CalibrantError: one is too small.
    """
    if samples < 1 or length < 2 or draw < 0 or seed < 0:
        raise CalibrantError(
            f"{samples} samples of {length} tokens, seed {seed}, draw {draw}: "
            "need at least 1 sample of 2 tokens, and a seed and draw of at least 0"
        )


def default_length(folder: ModelFolder) -> int:
    """512 tokens, or the model's context if that is shorter."""
    return min(DEFAULT_LENGTH, folder.context_length or DEFAULT_LENGTH)


def check_length(folder: ModelFolder, length: int) -> None:
    """Refuse lengths beyond the model's context.

    Raises:
        CalibrantError: the length is too large.
    """
    context = folder.context_length
    if context is not None and length > context:
        raise CalibrantError(
            f"{folder.path}: {length} tokens are more than the model's context of {context}; use --length {context}"
        )
