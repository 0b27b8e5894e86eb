"""Inspection of calibration sets: statistics, unusual rows and pairwise overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.calibration.selection.request import SelectionRequest
from calibrant.calibration.text_statistics import describe_set, overlap
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.losses import row_losses
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.progress import NoProgress, Progress
from calibrant.report.inspection_page import PAGE_MARK, InspectedSet, inspection_page
from calibrant.report.page import check_chart_libraries, is_replaceable

# Counts whose names say too little.
_COUNT_LABELS = {
    "documents": "documents in the corpus",
    "documents_used": "documents read for windows",
    "classes": "kinds of tokens in the tokenizer",
    "classes_covered": "kinds of tokens in the set",
}
# Counts of every corpus; others are zero only where a filter was asked for.
_USUALLY_ZERO = {"documents_empty", "documents_too_long", "documents_unusable", "documents_too_short", "masked_tokens"}


@dataclass(frozen=True)
class Inspection:
    """Statistics of calibration sets, and the overlap of each pair."""

    sets: list[InspectedSet]
    overlaps: list[dict[str, Any]]

    def page(self) -> str:
        """Self-contained HTML page.

        Raises:
            CalibrantError: the extra ``report`` is not installed.
        """
        return inspection_page(self.sets, self.overlaps)

    def as_json(self) -> dict[str, Any]:
        """Numbers, unusual rows and overlaps as JSON values."""
        return {
            "sets": [
                {
                    "name": one.name,
                    "set_sha256": one.facts["SHA-256"],
                    **one.statistics.numbers,
                    "odd_rows": [{"row": odd.row, "reasons": odd.reasons} for odd in one.statistics.odd],
                }
                for one in self.sets
            ],
            "overlaps": self.overlaps,
        }


def inspect_sets(
    folders: Sequence[str | Path],
    *,
    model: str | Path | None = None,
    perplexity: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Inspection:
    """Read saved calibration sets and describe them.

    Args:
        folders: folders of the sets.
        model: model whose tokenizer made the sets; None takes the location in each manifest.
        perplexity: also run the model over every row.
        device: where the model runs.
        dtype: what the model computes in.
        progress: receives progress reports.

    Raises:
        CalibrantError: a set cannot be read, or its tokenizer is missing or a different one.
    """
    if not folders:
        raise CalibrantError("no calibration set is named")
    loaded = [CalibrationSet.load(folder) for folder in folders]
    names = _names([Path(folder) for folder in folders])
    sets = []
    for folder, name, calibration in zip(folders, names, loaded, strict=True):
        path = _model_folder(folder, calibration, model)
        tokenizer = Tokenizer(path)
        # Sets of given token ids may not name their tokenizer.
        if calibration.manifest.tokenizer_sha256 not in ("", tokenizer.sha256):
            raise CalibrantError(
                f"{folder}: was made with another tokenizer than {path}'s; name its model with `model`"
            )
        texts = [
            _readable(tokenizer, row[kept].tolist())
            for row, kept in zip(calibration.tokens, calibration.mask, strict=True)
        ]
        losses = _losses(folder, path, calibration, device, dtype, progress or NoProgress()) if perplexity else None
        statistics = describe_set(calibration, texts, tokenizer.size, losses)
        sets.append(InspectedSet(name, set_facts(calibration.manifest), statistics, texts))
    overlaps = [
        {"left": names[i], "right": names[j], **overlap(loaded[i], loaded[j])}
        for i, j in combinations(range(len(loaded)), 2)
    ]
    return Inspection(sets, overlaps)


def check_page(path: Path) -> None:
    """Check that an inspection page can be made and may be written to ``path``.

    Raises:
        CalibrantError: the extra ``report`` is not installed, the path is a folder or a file other than an inspection
            page, or its parent folder is missing.
    """
    check_chart_libraries()
    if not is_replaceable(path, PAGE_MARK):
        raise CalibrantError(f"{path}: exists and is not an inspection page; choose another file")
    if not path.absolute().parent.is_dir():
        raise CalibrantError(f"{path.parent}: no such folder to write the page to")


def _names(folders: list[Path]) -> list[str]:
    """Names of the folders, or their paths if two folders have the same name."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _model_folder(folder: str | Path, calibration: CalibrationSet, model: str | Path | None) -> Path:
    named = [str(model)] if model is not None else calibration.manifest.locations.get("model", [])
    if not named:
        raise CalibrantError(f"{folder}: its manifest does not say where its model was; name it with `model`")
    try:
        return Path(model_path(named[0]))
    except CalibrantError as error:
        raise CalibrantError(f"{error}; name the model with `model`") from error


def _losses(
    folder: str | Path, path: Path, calibration: CalibrationSet, device: str, dtype: str, progress: Progress
) -> list[float]:
    prefix = Tokenizer(path).prefix
    model_folder = ModelFolder(path, allow_quantized=True)
    if int(calibration.tokens.max()) >= model_folder.vocabulary:
        raise CalibrantError(
            f"{folder}: has token ids outside {path}'s vocabulary of {model_folder.vocabulary}; name its model with "
            "`model`"
        )
    model = load_whole(model_folder, device, dtype)
    losses = []
    with progress.task("running the model", len(calibration.tokens), "rows") as task:
        for row, kept in zip(calibration.tokens, calibration.mask, strict=True):
            # The model expects texts to begin with its prefix (BOS): rows without it get it as uncounted context.
            begin = row.new_tensor([] if row[: len(prefix)].tolist() == prefix else prefix)
            counted = torch.cat([torch.zeros_like(begin, dtype=torch.bool), kept])
            losses += row_losses(model, torch.cat([begin, row])[None], counted[None])
            task.advance()
    return losses


def set_facts(manifest: Manifest) -> dict[str, str]:
    """What a manifest says of its set, by label."""
    sources = ", ".join(f"{corpus['name']} ({corpus['rows']} rows)" for corpus in manifest.corpora)
    facts = {
        "strategy": manifest.strategy,
        "corpora": sources,
        "size": f"{manifest.samples} rows of {manifest.length} tokens"
        + (f", the first of {manifest.head_of}" if manifest.head_of is not None else ""),
        "seed and draw": f"{manifest.seed}, {manifest.draw}",
        "parameters": _changed_parameters(manifest.parameters, SelectionRequest().recorded()),
        "counts": ", ".join(
            f"{_COUNT_LABELS.get(name, _words(name))} {value:,}"
            for name, value in manifest.counts.items()
            if value or name not in _USUALLY_ZERO
        ),
        "SHA-256": manifest.set_sha256,
    }
    return {name: value for name, value in facts.items() if value}


def _readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of a row; ids beyond the tokenizer's vocabulary, which embeddings may have, are only counted."""
    known = [index for index in ids if 0 <= index < tokenizer.size]
    unknown = len(ids) - len(known)
    return tokenizer.decode(known) + (f"\n({unknown} ids that the tokenizer does not know)" if unknown else "")


def _changed_parameters(parameters: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """Parameters that differ from their ``usual`` values, as text."""
    said = []
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            inner = _changed_parameters(value, usual.get(name, {}))
            said += [f"{_words(name)}: {inner}"] if inner else []
        elif name not in usual or value != usual[name]:
            said.append(f"{_words(name)} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "; ".join(said)


def _words(name: str) -> str:
    """A name of a manifest as readers write it."""
    return name.replace("_", " ")
