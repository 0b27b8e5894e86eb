"""A study as cells that are measured one by one and kept, so that a stopped study goes on where it was."""

import json
import platform
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import calibrant as cb


def measured(
    file: Path, settings: dict[str, Any], labels: Iterable[str], measure: Callable[[str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Cells by label: those in ``file`` that were measured with the same settings, the others measured now."""
    settings = {**settings, "torch": torch.__version__, "calibrant": cb.__version__}
    known = json.loads(file.read_text()) if file.exists() else {"settings": settings, "runs": {}}
    if known["settings"] != settings:
        raise SystemExit(f"{file}: was measured with other settings; name another file with --json, or delete it")
    runs: dict[str, dict[str, Any]] = known["runs"]
    file.parent.mkdir(exist_ok=True)
    for label in labels:
        if label in runs:
            continue
        runs[label] = measure(label)
        print(f"{label}: {runs[label]['kl']}, {runs[label]['seconds']:.0f} s", flush=True)
        where = {"system": platform.platform(), "date": datetime.now(UTC).date().isoformat()}
        file.write_text(json.dumps({**where, "settings": settings, "runs": runs}, indent=2) + "\n")
    return runs


def on_texts(output: Path, model: Path, texts: list[str], windows: int, length: int) -> dict[str, dict[str, float]]:
    """By text: the divergence of ``output`` from ``model``, and the perplexity of both."""
    found: dict[str, dict[str, float]] = {"kl": {}, "perplexity": {}, "original": {}}
    for text in texts:
        one = cb.evaluate(output, against=model, text=text, limit=windows, length=length)
        assert one.divergence is not None
        assert one.original is not None
        name = Path(text).name
        found["kl"][name] = one.divergence.kl_mean
        found["perplexity"][name], found["original"][name] = one.perplexity.value, one.original.value
    return found


def over_seeds(runs: dict[str, dict[str, Any]]) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """The runs of each cell, by its label without the seed, in order."""
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for label, run in runs.items():
        cells.setdefault(tuple(label.split(", ")[:-1]), []).append(run)
    return sorted(cells.items())


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    numbers = torch.tensor(values)
    return f"{numbers.mean():.{digits}f}" + (f" ± {numbers.std():.{digits}f}" if len(values) > 1 else "")
