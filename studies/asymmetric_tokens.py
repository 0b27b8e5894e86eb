"""How much of the drift to make up for, by how many tokens there are to know it from.

    python studies/asymmetric_tokens.py MODEL --corpus c4.jsonl.gz --text wiki.test.raw.gz

GPTQ at 3 bits with a share of the drift from 0 (none) to 1 (wholly asymmetric), from a few rows to many, several draws
of a corpus; divergence from the original on a text. The JSON holds every run; finished runs are kept.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.recipes.recipe import Recipe
from cells import measured, on_texts, over_seeds, spread

HERE = Path(__file__).parent
SHARES = (0.0, 0.25, 0.5, 1.0)


def recipe(share: float) -> Recipe:
    """GPTQ that makes up for that share."""
    scheme = {"weights": {"bits": 3, "group_size": "auto"}}
    fields = {"name": "study", "description": "study", "method": {"name": "gptq"}, "scheme": scheme}
    return Recipe.model_validate({**fields, "drift_correction": share})


def measure(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """One cell: rows, share, draw."""
    rows, share, draw = label.split(", ")
    begin = time.perf_counter()
    samples = int(rows.removesuffix(" rows"))
    made = cb.select(
        options.corpus,
        tokenizer=options.model,
        samples=samples,
        length=options.length,
        draw=int(draw.removeprefix("draw ")),
        stride=samples,
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        cb.compress(options.model, output=output, recipe=recipe(float(share)), calibration=made, dtype=options.dtype)
        found = on_texts(output, options.model, [options.text], options.windows, options.length)
    return {**found, "seconds": time.perf_counter() - begin}


def show(runs: dict[str, dict[str, Any]], rows: list[int]) -> None:
    """Divergence by share and rows: means and standard deviations over draws."""
    cells = {label: [next(iter(run["kl"].values())) for run in several] for label, several in over_seeds(runs)}
    table = Table("share of the drift", *[f"{count} rows" for count in rows])
    for share in SHARES:
        table.add_row(str(share), *[spread(cells[f"{count} rows", str(share)]) for count in rows])
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    file = options.json or HERE / "results" / f"asymmetric_tokens_{options.model.resolve().name}.json"
    settings = {
        "model": options.model.resolve().name,
        "corpus": options.corpus.name,
        "text": options.text.name,
        "length": options.length,
        "windows": options.windows,
        "dtype": options.dtype,
    }
    labels = [
        f"{rows} rows, {share}, draw {draw}"
        for draw in range(options.draws)
        for rows in options.rows
        for share in SHARES
    ]
    show(measured(file, settings, labels, lambda label: measure(label, options)), options.rows)


if __name__ == "__main__":
    main()
