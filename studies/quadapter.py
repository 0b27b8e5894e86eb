"""Quadapter beside quantization-aware training: who over-fits to the text at hand, and from how much of it.

    python studies/quadapter.py studies/small_models/gpt2-shaped --outliers 4 --factor 64 --learning-rate 5e-4 \\
        --tuning shakespeare.tuning.jsonl code.tuning.jsonl \\
        --texts shakespeare.test.txt code.test.txt wiki.test.raw.gz

W8A8 with static ranges throughout. Each method is given a share of the rows drawn from one tuning text; its result is
measured on all texts by perplexity over the original model's. Tuning texts should have many documents, or every seed
gives the same rows, and share none with the texts to measure on (``split_text.py``). Trainings keep the parameters of
least loss on held-out rows of the tuning text. With --outliers channels behind every norm are made larger first, the
function unchanged. The JSON holds every run; finished runs are kept.
"""

import argparse
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.recipes.recipe import Recipe
from cells import measured, on_texts, over_seeds, spread
from outliers import plant

HERE = Path(__file__).parent
METHODS: dict[str, dict[str, Any]] = {
    "static": {},
    "SmoothQuant": {"transforms": [{"name": "smoothquant"}]},
    "QAT": {"method": {"name": "qat", "objective": "text"}},
    "Quadapter 1": {"transforms": [{"name": "quadapter"}]},
    "Quadapter 1 + 2": {
        "transforms": [{"name": "quadapter"}],
        "method": {"name": "quadapter", "objective": "text"},
    },
}


def recipe(method: str, options: argparse.Namespace, seed: int) -> Recipe:
    """One method's recipe."""
    cell = {"name": "study", "description": method, "method": {"name": "rtn"}, **METHODS[method]}
    if cell["method"]["name"] != "rtn":
        shared = {"steps": options.steps, "batch_size": 8, "length": options.length, "seed": seed}
        cell["method"] = {**cell["method"], **shared, "eval_steps": max(1, options.steps // 10)}
    if method.startswith("Quadapter"):
        cell["transforms"] = [{**cell["transforms"][0], "steps": options.block_steps}]
    if method == "QAT":
        cell["method"]["learning_rate"] = options.learning_rate
    scheme = {"weights": {"bits": 8}, "activations": {"dynamic": False}}
    return Recipe.model_validate({**cell, "scheme": scheme})


def share_of(made: CalibrationSet, share: float) -> CalibrationSet:
    """The first rows of a set, two at least, so that one can be held out."""
    rows = max(2, round(share * len(made.tokens)))
    manifest = made.manifest.model_copy(update={"samples": rows, "rows": made.manifest.rows[:rows]})
    return CalibrationSet.build(made.tokens[:rows], made.mask[:rows], manifest)


def measure(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """One cell."""
    method, text, share, seed = label.split(", ")
    corpus = next(path for path in options.tuning if Path(path).name == text)
    whole = cb.select(corpus, tokenizer=options.model, samples=options.samples, length=options.length, seed=int(seed))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        begin = time.perf_counter()
        chosen = recipe(method, options, int(seed))
        cb.compress(options.model, output=output, recipe=chosen, calibration=share_of(whole, float(share)))
        seconds = time.perf_counter() - begin
        found = on_texts(output, options.model, options.texts, options.windows, options.length)
    return {**found, "seconds": seconds}


def show(runs: dict[str, dict[str, Any]], texts: list[str]) -> None:
    """Logarithm of the perplexity's ratio to the original's: means and standard deviations over seeds."""
    names = [Path(text).name for text in texts]
    table = Table("tuned on", "share", "method", *names, title="log perplexity ratio to the original model")
    for (method, text, share), several in sorted(over_seeds(runs), key=lambda cell: cell[0][1:]):
        ratios = [[math.log(run["perplexity"][name] / run["original"][name]) for run in several] for name in names]
        table.add_row(text, share, method, *map(spread, ratios))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tuning", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=256, help="rows of the whole of a tuning text")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="of QAT and of Quadapter's second phase")
    parser.add_argument("--block-steps", type=int, default=100, help="of Quadapter's first phase, for each block")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of QAT's weights")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--outliers", type=int, default=0, help="channels planted behind every norm")
    parser.add_argument("--factor", type=float, default=32.0, help="how much larger those are made")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    file = options.json or HERE / "results" / f"quadapter_{options.model.resolve().name}.json"
    labels = [
        f"{method}, {Path(text).name}, {share:g}, {seed}"
        for seed in options.seeds
        for text in options.tuning
        for share in options.shares
        for method in options.methods
    ]
    settings = {
        key: vars(options)[key]
        for key in ("samples", "length", "steps", "block_steps", "learning_rate", "windows", "outliers", "factor")
    }
    settings |= {key: [Path(text).name for text in vars(options)[key]] for key in ("tuning", "texts")}
    with tempfile.TemporaryDirectory() as folder:
        if options.outliers:
            plant(options.model, Path(folder) / "model", options.outliers, options.factor)
            options.model = Path(folder) / "model"
        show(measured(file, settings, labels, partial(measure, options=options)), options.texts)


if __name__ == "__main__":
    main()
