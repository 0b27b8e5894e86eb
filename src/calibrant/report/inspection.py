"""Looking at calibration sets: read them, put them into words and numbers, compare them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from calibrant.calibration.calibration_set import CalibrationSet
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

# A page says near its beginning what made it.
_PAGE_HEAD = 500


@dataclass(frozen=True)
class Inspection:
    """Sets in numbers, and for each pair how much it shares."""

    sets: list[InspectedSet]
    overlaps: list[dict[str, Any]]

    def page(self) -> str:
        """One self-contained HTML page."""
        return inspection_page(self.sets, self.overlaps)

    def as_json(self) -> dict[str, Any]:
        """Numbers, odd rows and overlaps for programs."""
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
    """Read saved sets and describe them.

    ``model`` is a folder whose tokenizer made them; left out, it is looked for where each manifest says.
    ``perplexity`` runs the model over every row.

    Raises:
        CalibrantError: a set cannot be read, or its tokenizer is another one or not there.
    """
    if not folders:
        raise CalibrantError("no calibration set is named")
    loaded = [CalibrationSet.load(folder) for folder in folders]
    names = _names([Path(folder) for folder in folders])
    sets = []
    for folder, name, calibration in zip(folders, names, loaded, strict=True):
        path = _model_of(folder, calibration, model)
        tokenizer = Tokenizer(path)
        if tokenizer.sha256 != calibration.manifest.tokenizer_sha256:
            raise CalibrantError(
                f"{folder}: was made with another tokenizer than {path}'s; name its model with --model"
            )
        texts = [
            _readable(tokenizer, row[kept].tolist())
            for row, kept in zip(calibration.tokens, calibration.mask, strict=True)
        ]
        losses = _losses(path, calibration, device, dtype, progress or NoProgress()) if perplexity else None
        statistics = describe_set(calibration, texts, tokenizer.size, losses)
        sets.append(InspectedSet(name, _facts(calibration), statistics, texts))
    overlaps = [
        {"left": names[i], "right": names[j], **overlap(loaded[i], loaded[j])}
        for i, j in combinations(range(len(loaded)), 2)
    ]
    return Inspection(sets, overlaps)


def check_page(path: Path) -> None:
    """Refuse a place for a page that is taken by anything but an earlier page, or that cannot be written.

    Raises:
        CalibrantError: it is a folder, another file, or its parent is no folder.
    """
    if path.is_dir() or (path.exists() and PAGE_MARK.encode() not in path.read_bytes()[:_PAGE_HEAD]):
        raise CalibrantError(f"{path}: exists and is no page of calibrant data inspect; choose another --html")
    if not path.absolute().parent.is_dir():
        raise CalibrantError(f"{path.parent}: no such folder to write the page to")


def _names(folders: list[Path]) -> list[str]:
    """Folder names, or whole paths where names are equal."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _model_of(folder: str | Path, calibration: CalibrationSet, model: str | Path | None) -> Path:
    named = [str(model)] if model is not None else calibration.manifest.locations.get("model", [])
    if not named:
        raise CalibrantError(f"{folder}: its manifest does not say where its model was; name it with --model")
    try:
        return Path(model_path(named[0]))
    except CalibrantError as error:
        raise CalibrantError(f"{error}; name the model with --model") from error


def _losses(path: Path, calibration: CalibrationSet, device: str, dtype: str, progress: Progress) -> list[float]:
    prefix = Tokenizer(path).prefix
    model = load_whole(ModelFolder(path, allow_quantized=True), device, dtype)
    losses = []
    with progress.task("running the model", len(calibration.tokens)) as task:
        for row, kept in zip(calibration.tokens, calibration.mask, strict=True):
            # A row that begins unlike the model's texts is judged behind what they begin with.
            begin = row.new_tensor([] if row[: len(prefix)].tolist() == prefix else prefix)
            counted = torch.cat([torch.zeros_like(begin, dtype=torch.bool), kept])
            losses += row_losses(model, torch.cat([begin, row])[None], counted[None])
            task.advance()
    return losses


def _facts(calibration: CalibrationSet) -> dict[str, str]:
    manifest = calibration.manifest
    sources = ", ".join(f"{corpus['name']} ({corpus['rows']} rows)" for corpus in manifest.corpora)
    facts = {
        "strategy": manifest.strategy,
        "corpora": sources,
        "size": f"{manifest.samples} rows of {manifest.length} tokens",
        "seed and draw": f"{manifest.seed}, {manifest.draw}",
        "parameters": _options(manifest.parameters, SelectionRequest().recorded()),
        "counts": ", ".join(f"{name} {value:,}" for name, value in manifest.counts.items()),
        "SHA-256": manifest.set_sha256,
    }
    return {name: value for name, value in facts.items() if value}


def _readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of a row; a model's embedding may hold more ids than its tokenizer knows."""
    known = [index for index in ids if 0 <= index < tokenizer.size]
    unknown = len(ids) - len(known)
    return tokenizer.decode(known) + (f"\n({unknown} ids that the tokenizer does not know)" if unknown else "")


def _options(parameters: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """What was asked for beyond the ``usual`` values, in words."""
    said = []
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            inner = _options(value, usual.get(name, {}))
            said += [f"{name}: {inner}"] if inner else []
        elif name not in usual or value != usual[name]:
            said.append(f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "; ".join(said)
