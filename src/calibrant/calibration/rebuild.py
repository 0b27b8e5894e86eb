"""Calibration sets made again from their manifests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calibrant.calibration.calibration_set import CalibrationSet, Manifest, read_manifest
from calibrant.calibration.corpus import BUILTIN, OF_THE_PASS, Corpus
from calibrant.calibration.generate import DEFAULT_PERCENTILE, SOURCES, generate
from calibrant.calibration.mix_sets import STRATEGY as MIX
from calibrant.calibration.select import run_selection
from calibrant.calibration.selection.request import WITH_DRAWS, SelectionRequest, selection_request
from calibrant.calibration.sources.self_calibration import TemperatureSchedule
from calibrant.errors import CalibrantError
from calibrant.executors import LocalExecutor
from calibrant.modeling.hub import DEMO
from calibrant.progress import NoProgress, Progress


@dataclass(frozen=True)
class Rebuilt:
    """A set made again, with the tokens that its manifest names.

    ``changes`` lists inputs and libraries that differ from the manifest's without an effect on the tokens.
    """

    calibration: CalibrationSet
    changes: list[str]


def rebuild(
    manifest: str | Path,
    *,
    model: str | Path | None = None,
    corpora: Sequence[Corpus | str | Path] | None = None,
    leakage: Sequence[str | Path] | None = None,
    targets: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> Rebuilt:
    """Make a calibration set again from its manifest (the file, or the set's folder).

    The model, the corpora, the evaluation texts and the targets are read from ``model``, ``corpora``, ``leakage`` and
    ``targets``, by default from the locations in the manifest. A corpus that was in memory has to be passed with
    ``corpora``.

    Raises:
        CalibrantError: an input is missing, or the tokens come out differently; the message lists what changed.
    """
    wanted = read_manifest(manifest)
    if wanted.strategy == "tokens":
        raise CalibrantError(f"{manifest}: the set was made from given token ids, which cannot be made again")
    if wanted.strategy == MIX:
        raise CalibrantError(f"{manifest}: the set is a mix of others; make those again, and mix them again")
    if not wanted.locations.get("model"):
        raise CalibrantError(f"{manifest}: does not say where its model was; it is from before sets could be rebuilt")
    if corpora is None and any(described.get("kind") == "memory" for described in wanted.corpora):
        raise CalibrantError(
            f"{manifest}: the set was made from a corpus in memory; pass the same texts with `corpora`"
        )
    place = str(model) if model is not None else wanted.locations["model"][0]
    given = list(corpora) if corpora is not None else wanted.locations.get("corpora", [])
    if len(given) != len(wanted.corpora):
        raise CalibrantError(f"{len(given)} corpora are given, the set was made from {len(wanted.corpora)}")
    whole = wanted if wanted.head_of is None else wanted.model_copy(update={"samples": wanted.head_of})
    request = None if wanted.strategy in SOURCES else _selection(whole, manifest, leakage, targets)
    for what, option, where in (
        ("model", "model", [place]),
        ("corpus", "corpora", [str(one) for one in given if not isinstance(one, Corpus)]),
        ("leakage", "leakage", [] if request is None else request.filters.leakage),
        ("target", "targets", [] if request is None else request.targets),
    ):
        for one in where:
            if one not in (BUILTIN, DEMO) and not one.startswith("hub:") and not _exists(one):
                raise CalibrantError(
                    f"{manifest}: its {what} {one} is not there (any more); give its location with `{option}`"
                )
    opened = [
        one if isinstance(one, Corpus) else Corpus(one, described.get("field", "text"))
        for one, described in zip(given, wanted.corpora, strict=True)
    ]
    listener = progress or NoProgress()
    if request is None:
        made = _generate_again(whole, manifest, place, opened, listener)
    else:
        scored = wanted.model or {}
        device, dtype = scored.get("device", "cpu"), scored.get("dtype", "auto")
        made = run_selection(opened, place, request, device, dtype, LocalExecutor(), listener)
    made = made.head(wanted.samples)
    changes = _changes(wanted, made.manifest)
    if made.sha256 != wanted.set_sha256:
        what = "; ".join(changes) or "nothing that is recorded: the processor or its number of threads may differ"
        raise CalibrantError(
            f"{manifest}: the set cannot be made again, its tokens come out differently. Changed: {what}"
        )
    return Rebuilt(CalibrationSet(made.tokens, made.mask, wanted), changes)


class _GenerationParameters(BaseModel):
    """The parameters of sources that decide the result again; the others follow from the model."""

    model_config = ConfigDict(strict=True, extra="ignore")

    first_tokens: str = "any"
    percentile: float = DEFAULT_PERCENTILE
    mask: str = "all"
    batch_size: int = Field(default=64, ge=1, le=1 << 20)
    device: str = "cpu"
    compute_dtype: str = "auto"
    temperature_initial: float | None = None
    temperature_final: float = 1.0
    temperature_steps: int = Field(default=0, ge=0, le=1 << 20)


def _exists(place: str) -> bool:
    try:
        return Path(place).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _selection(
    wanted: Manifest,
    manifest: str | Path,
    leakage: Sequence[str | Path] | None,
    targets: Sequence[str | Path] | None,
) -> SelectionRequest:
    """The request in ``wanted``, with the evaluation texts at ``leakage`` and the targets at ``targets``."""
    fields = wanted.model_dump(include={"samples", "length", "seed", "draw", "strategy"})
    # Before strides were recorded, draws followed one another.
    usual = {"stride": wanted.samples} if wanted.strategy in WITH_DRAWS else {}
    try:
        request = selection_request(**{**usual, **wanted.parameters, **fields})
    except CalibrantError as error:
        raise CalibrantError(f"{manifest}: not a calibration manifest ({error})") from error
    if leakage is not None:
        moved = _as_many(leakage, len(wanted.evaluations), "evaluation texts")
        filters = request.filters.model_copy(update={"leakage": moved})
        request = request.model_copy(update={"filters": filters})
    if targets is not None:
        request = request.model_copy(update={"targets": _as_many(targets, len(wanted.targets), "targets")})
    return request


def _as_many(given: Sequence[str | Path], wanted: int, what: str) -> tuple[str, ...]:
    if len(given) != wanted:
        raise CalibrantError(f"{len(given)} {what} are given, the set was made with {wanted}")
    return tuple(map(str, given))


def _generate_again(
    wanted: Manifest, manifest: str | Path, model: str, corpora: list[Corpus], progress: Progress
) -> CalibrationSet:
    try:
        given = _GenerationParameters.model_validate(wanted.parameters)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in ("parameters", *problem["loc"]))
        raise CalibrantError(f"{manifest}: not a calibration manifest ({where}: {problem['msg']})") from error
    options: dict[str, Any] = wanted.model_dump(include={"samples", "length", "seed", "draw", "strategy"})
    options |= given.model_dump(include={"first_tokens", "percentile", "mask", "batch_size", "device"})
    if given.temperature_initial is not None:
        options["temperature"] = TemperatureSchedule(
            given.temperature_initial, given.temperature_final, given.temperature_steps
        )
    if corpora:
        options["corpus"] = corpora[0]
    return generate(model, dtype=given.compute_dtype, progress=progress, **options)


def _changes(wanted: Manifest, made: Manifest) -> list[str]:
    """A phrase for every input and library that differs."""
    changes = []
    configs = [(one.model or {}).get("config_sha256") for one in (wanted, made)]
    if wanted.tokenizer_sha256 != made.tokenizer_sha256:
        changes.append("the tokenizer")
    elif wanted.tokenizer_files_sha256 != made.tokenizer_files_sha256:
        # config.json is one of these files, since it may name the tokenizer's class.
        perhaps = "perhaps " if configs[0] != configs[1] else ""
        changes.append(f"{perhaps}the files of the tokenizer (its special tokens or other settings)")
    if wanted.chat_template_sha256 != made.chat_template_sha256:
        changes.append("the chat template")
    if wanted.chat_template_date != made.chat_template_date:
        date = wanted.chat_template_date or "that of the day"
        changes.append(f"the date that the chat template is given ({date} is now {made.chat_template_date})")
    for name, value in (wanted.model or {}).items():
        if (made.model or {}).get(name) != value:
            changes.append(f"the model's {name.removesuffix('_sha256')}")
    for before, now in zip(wanted.corpora, made.corpora, strict=True):
        changes += _corpus_changes(before, now)
    for before, now in zip(wanted.evaluations, made.evaluations, strict=False):
        changes += [text.replace("corpus", "leakage", 1) for text in _corpus_changes(before, now)]
    for before, now in zip(wanted.targets, made.targets, strict=False):
        changes += [text.replace("corpus", "target", 1) for text in _corpus_changes(before, now)]
    if wanted.embedding_sha256 != made.embedding_sha256:
        changes.append("the sentence encoder")
    for library, number in wanted.versions.items():
        if made.versions.get(library) != number:
            changes.append(f"{library} {number} is now {made.versions.get(library, 'not installed')}")
    return changes


def _corpus_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    files, current = before.get("files"), now.get("files")
    if files is None or current is None:
        same = all(before.get(key) == now.get(key) for key in {*before, *now} if key not in OF_THE_PASS)
        return [] if same else [f"the corpus {before.get('name')}"]
    if len(files) == len(current) == 1:  # a single file may have another name
        return [] if list(files.values()) == list(current.values()) else [f"the corpus file {next(iter(files))}"]
    gone = [f"the corpus file {name} is gone" for name in files if name not in current]
    new = [f"the corpus file {name} is new" for name in current if name not in files]
    return gone + new + [f"the corpus file {n}" for n in files if n in current and files[n] != current[n]]
