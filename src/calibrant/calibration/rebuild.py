"""Calibration sets made again from their manifests."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calibrant.calibration.calibration_set import MANIFEST_NAME, CalibrationSet, Manifest
from calibrant.calibration.corpus import BUILTIN, Corpus
from calibrant.calibration.generate import SOURCES, generate
from calibrant.calibration.select import run_selection
from calibrant.calibration.selection.request import selection_request
from calibrant.calibration.sources.self_calibration import TemperatureSchedule
from calibrant.errors import CalibrantError, first_line
from calibrant.executors import LocalExecutor
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
    progress: Progress | None = None,
) -> Rebuilt:
    """Make a calibration set again from its manifest (the file, or the set's folder).

    The model, the corpora and the evaluation texts are read from ``model``, ``corpora`` and ``leakage``, by default
    from the locations in the manifest. A corpus that was in memory has to be passed with ``corpora``.

    Raises:
        CalibrantError: an input is missing, or the tokens come out differently; the message lists what changed.
    """
    wanted = read_manifest(manifest)
    if wanted.strategy == "tokens":
        raise CalibrantError(f"{manifest}: the set was made from given token ids, which cannot be made again")
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
    if leakage is not None:
        wanted = _with_leakage_at(wanted, [str(one) for one in leakage])
    for what, option, where in (
        ("model", "model", [place]),
        ("corpus", "corpora", [str(one) for one in given if not isinstance(one, Corpus)]),
        ("leakage", "leakage", wanted.parameters.get("filters", {}).get("leakage", [])),
    ):
        for one in where:
            if one != BUILTIN and not one.startswith("hub:") and not Path(one).exists():
                raise CalibrantError(
                    f"{manifest}: its {what} {one} is not there (any more); give its location with `{option}`"
                )
    opened = [
        one if isinstance(one, Corpus) else Corpus(one, described.get("field", "text"))
        for one, described in zip(given, wanted.corpora, strict=True)
    ]
    again = _generate_again if wanted.strategy in SOURCES else _select_again
    made = again(wanted, place, opened, progress or NoProgress())
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


def _select_again(wanted: Manifest, model: str, corpora: list[Corpus], progress: Progress) -> CalibrationSet:
    fields = wanted.model_dump(include={"samples", "length", "seed", "draw", "strategy"})
    request = selection_request(**fields, **wanted.parameters)
    scored = wanted.model or {}
    return run_selection(
        corpora, model, request, scored.get("device", "cpu"), scored.get("dtype", "auto"), LocalExecutor(), progress
    )


def _generate_again(wanted: Manifest, model: str, corpora: list[Corpus], progress: Progress) -> CalibrationSet:
    given = wanted.parameters
    options: dict[str, Any] = wanted.model_dump(include={"samples", "length", "seed", "draw", "strategy"})
    options |= {name: given[name] for name in ("first_tokens", "percentile", "batch_size", "device") if name in given}
    if "compute_dtype" in given:
        options["dtype"] = given["compute_dtype"]
    if "temperature_initial" in given:
        options["temperature"] = TemperatureSchedule(
            given["temperature_initial"], given["temperature_final"], given["temperature_steps"]
        )
    if corpora:
        options["corpus"] = corpora[0]
    return generate(model, progress=progress, **options)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest at ``path``, a file or a set's folder.

    Raises:
        CalibrantError: there is no readable manifest.
    """
    file = Path(path) / MANIFEST_NAME if Path(path).is_dir() else Path(path)
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        said = "keys are missing or wrong" if isinstance(error, ValidationError) else first_line(error)
        raise CalibrantError(f"{file}: not a calibration manifest ({said})") from error


def _changes(wanted: Manifest, made: Manifest) -> list[str]:
    """A phrase for every input and library that differs."""
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
