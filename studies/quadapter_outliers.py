"""Planted outlier channels: what static W8A8 loses to them, and what Quadapter's first phase brings back.

    python studies/quadapter_outliers.py MODEL --corpus c4.utf8.gz --text wiki.test.raw.gz

Some channels behind every norm are made larger and the linears' columns smaller by the same factor (``outliers.py``);
then the model is quantized by round-to-nearest, by SmoothQuant and by Quadapter.
"""

import argparse
import json
import math
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.recipes.recipe import Recipe
from outliers import found_share, plant

HERE = Path(__file__).parent
CLEAN, PLAIN = "round-to-nearest without outliers", "round-to-nearest"
TRANSFORMS: dict[str, list[dict[str, Any]]] = {
    PLAIN: [],
    "SmoothQuant": [{"name": "smoothquant", "alpha": 0.5}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=32.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.06)
    parser.add_argument("--draws", type=int, default=1, help="calibration sets")
    options = parser.parse_args()
    settings = {"model": options.model.resolve().name, "channels": options.channels, "factor": options.factor}
    settings |= {"samples": options.samples, "windows": options.windows}
    settings |= {"steps": options.steps, "learning_rate": options.learning_rate}
    file = HERE / "results" / "quadapter_outliers.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    runs: list[dict[str, Any]] = known["runs"] if known.get("settings") == settings else []
    quadapter = {"name": "quadapter", "steps": options.steps, "learning_rate": options.learning_rate}
    with tempfile.TemporaryDirectory() as name:
        harmed = Path(name) / "harmed"
        planted = plant(options.model, harmed, options.channels, options.factor)
        for draw in range(options.draws):
            data = cb.select(
                options.corpus,
                tokenizer=options.model,
                samples=options.samples,
                length=512,
                draw=draw,
                stride=options.samples,
            )
            for label, transforms in {CLEAN: [], **TRANSFORMS, "Quadapter": [quadapter]}.items():
                if any((run["method"], run["draw"]) == (label, draw) for run in runs):
                    continue
                model = options.model if label == CLEAN else harmed
                run = measure(model, transforms, data, options, Path(name) / "out")
                found = found_share(planted, harmed, Path(name) / "out") if transforms else None
                runs.append({"method": label, "draw": draw, **run, "planted_found": found})
                print(runs[-1], flush=True)
                found_so_far = {"settings": settings, "runs": runs, "system": platform.platform()}
                found_so_far["date"] = datetime.now(UTC).date().isoformat()
                file.write_text(json.dumps(found_so_far, indent=2) + "\n")
    show(runs)


def measure(
    model: Path, transforms: list[dict[str, Any]], data: cb.CalibrationSet, options: argparse.Namespace, output: Path
) -> dict[str, Any]:
    """Quantize ``model`` and compare it with itself."""
    scheme = {"weights": {"bits": 8}, "activations": {"dynamic": False}}
    said = {"name": "study", "description": "study", "transforms": transforms, "scheme": scheme}
    recipe = Recipe.model_validate({**said, "method": {"name": "rtn"}})
    report = cb.compress(model, output=output, recipe=recipe, calibration=data, overwrite=True)
    result = cb.evaluate(output, against=model, text=options.text, length=512, limit=options.windows)
    assert result.divergence is not None
    return {
        "perplexity": result.perplexity.value,
        "kl_mean": result.divergence.kl_mean,
        "kl_standard_error": result.divergence.kl_standard_error,
        "seconds": sum(report.seconds.values()),
    }


def show(runs: list[dict[str, Any]]) -> None:
    """The table; what outliers cost is the log loss beyond that of the model without them, rounded the same way."""
    table = Table("method", "draw", "perplexity", "brought back", "KL", "planted found", "s")
    for run in runs:
        clean, plain = (
            next(math.log(one["perplexity"]) for one in runs if (one["method"], one["draw"]) == (label, run["draw"]))
            for label in (CLEAN, PLAIN)
        )
        recovered = (plain - math.log(run["perplexity"])) / (plain - clean)
        found = "" if run["planted_found"] is None else f"{run['planted_found']:.0%}"
        error = f"{run['kl_mean']:.4f} ± {run['kl_standard_error']:.4f}"
        shown = (f"{run['perplexity']:.2f}", f"{recovered:.1%}", error, found, f"{run['seconds']:.0f}")
        table.add_row(run["method"], str(run["draw"]), *shown)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
