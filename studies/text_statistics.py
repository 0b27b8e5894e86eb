"""The signs of Table 4 of the self-calibration paper (arXiv 2410.17170): self-written, real and random text.

python studies/text_statistics.py MODEL [MODEL ...] --text c4.utf8.gz wiki.utf8.gz

Documents are the paragraphs of the given texts, so that rows come from many places. Several sets of every kind; a sign
counts where it holds between the means and the difference is more than two standard errors. The paper finds that
self-written text has lower perplexity, coverage and n-gram diversity and a steeper Zipf slope than real text, and
vocabulary the opposite. It samples at temperature 1; lower ones are there to see where a sign begins to hold.
"""

import argparse
import json
import math
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

import calibrant as cb
from calibrant.report.inspection import inspect_sets

Made = cb.CalibrationSet
SHORTEST = 200
MEASURES = ("perplexity", "repetition", "coverage", "div_token", "div_word", "zipf_token", "zipf_word")
# Of self-written against real text; vocabulary the other way round.
EXPECTED = {"perplexity": -1, "coverage": -1, "div_word": -1, "zipf_word": 1}


def paragraphs(text: Path, target: Path) -> Path:
    """The text's lines of some length, a document each."""
    lines = (line.strip() for document in cb.Corpus(text) for line in document.text.splitlines())
    target.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if len(line) >= SHORTEST))
    return target


def sets_of(model: Path, options: argparse.Namespace) -> dict[str, list[Made]]:
    """Sets by kind, ``draws`` of each."""
    size = {"samples": options.samples, "length": options.length}
    draws = range(options.draws)
    made = {
        f"self {heat:g}": [
            cb.generate(model, temperature=cb.TemperatureSchedule(heat, heat, 0), draw=draw, **size) for draw in draws
        ]
        for heat in options.temperatures
    }
    made["vocabulary"] = [cb.generate(model, strategy="vocabulary", draw=draw, **size) for draw in draws]
    with tempfile.TemporaryDirectory() as folder:
        for text in options.text:
            corpus = paragraphs(text, Path(folder) / "paragraphs.jsonl")
            kind = text.name.partition(".")[0]
            made[kind] = [
                cb.select(corpus, tokenizer=model, draw=draw, stride=options.samples, **size) for draw in draws
            ]
    return made


def numbers_of(model: Path, sets: list[Made]) -> list[dict[str, float | None]]:
    """The statistics of every set, perplexity under ``model`` included."""
    with tempfile.TemporaryDirectory() as folder:
        places = []
        for index, one in enumerate(sets):
            places.append(Path(folder) / str(index))
            one.save(places[-1])
        return [one.statistics.numbers for one in inspect_sets(places, model=model, perplexity=True).sets]


def summary(numbers: list[dict[str, float | None]]) -> dict[str, tuple[float, float]]:
    """Mean and standard error of every measure."""
    found = {}
    for measure in MEASURES:
        values = [float(one[measure] or math.nan) for one in numbers]
        found[measure] = (statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))
    return found


def sign(left: tuple[float, float], right: tuple[float, float]) -> int:
    """1 or -1 where ``left`` is larger or smaller by more than two standard errors, else 0."""
    difference, error = left[0] - right[0], math.hypot(left[1], right[1])
    return 0 if abs(difference) <= 2 * error else (1 if difference > 0 else -1)


def signs_of(kinds: dict[str, Any], texts: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    """By real text, by kind of made text and by measure: does the sign hold?"""
    verdict = {1: "holds", 0: "within the error", -1: "the opposite"}
    return {
        text: {
            kind: {
                measure: verdict[
                    sign(values[measure], kinds[text][measure]) * expected * (-1 if kind == "vocabulary" else 1)
                ]
                for measure, expected in EXPECTED.items()
            }
            for kind, values in kinds.items()
            if kind not in texts
        }
        for text in texts
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8, 0.6])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    console = Console(width=170)
    transformers.utils.logging.disable_progress_bar()
    for model in options.models:
        made = sets_of(model, options)
        kinds = {kind: summary(numbers_of(model, sets)) for kind, sets in made.items()}
        table = Table("measure", *kinds, title=model.name)
        for measure in MEASURES:
            table.add_row(measure, *(f"{kind[measure][0]:.4g} ± {kind[measure][1]:.2g}" for kind in kinds.values()))
        console.print(table)
        signs = signs_of(kinds, [text.name.partition(".")[0] for text in options.text])
        table = Table("against", "of", *EXPECTED, title=f"{model.name}: signs")
        for text, of in signs.items():
            for kind, verdicts in of.items():
                table.add_row(text, kind, *verdicts.values())
        console.print(table)
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "samples": options.samples,
            "length": options.length,
            "draws": options.draws,
            "kinds": kinds,
            "signs": signs,
        }
        options.results.mkdir(exist_ok=True)
        file = options.results / f"text_statistics_{model.name}.json"
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
