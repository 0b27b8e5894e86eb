"""ZSAQ and its controls: what training without data is worth at fewer and fewer bits.

    python studies/zsaq.py MODEL --real c4.utf8.gz --texts wiki.test.raw.gz technical.utf8.gz inaugural.txt

Every arm trains for the same number of steps on as many tokens: against a generator (ZSAQ), with a frozen one, with
plain AdamW instead of sharpness-aware steps, with a smaller and a larger radius rho of them than ZSAQ's 0.05, on
random tokens, on text that the model wrote, on real text. Before training there is rounding to nearest. Measured: the
divergence from the original model on each text, its mean over the texts less the training loss, and sharpness (on what
was held out: self-written text, for the last arm real text); the last two only of runs whose training was of use, since
others keep the rounded model. The JSON holds every run; finished runs are kept.
"""

import argparse
import json
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

HERE = Path(__file__).parent
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {"weights": {"bits": 8}, "activations": {"dynamic": True}},
    "W4A8": {"weights": {"bits": 4, "range_search": "mse"}, "activations": {"dynamic": True}},
    "W2A8": {"weights": {"bits": 2, "group_size": "auto", "range_search": "mse"}, "activations": {"dynamic": True}},
}
ARMS: dict[str, dict[str, Any] | None] = {
    "round to nearest": None,
    "ZSAQ": {"name": "zsaq"},
    "without SAM": {"name": "zsaq", "sam_rho": 0.0},
    "rho 0.01": {"name": "zsaq", "sam_rho": 0.01},
    "rho 0.1": {"name": "zsaq", "sam_rho": 0.1},
    "frozen generator": {"name": "zsaq", "generator_learning_rate": 0.0},
    "random tokens": {"name": "zsaq", "inputs": "random"},
    "self-written text": {"name": "qat", "sam_rho": 0.05},
    "real text": {"name": "qat", "sam_rho": 0.05},
}


def recipe(arm: str, scheme: str, options: argparse.Namespace, seed: int) -> Recipe:
    """One cell's recipe."""
    training = ARMS[arm]
    if training is not None:
        shared = {"steps": options.steps, "batch_size": options.rows, "length": options.length, "seed": seed}
        training = {
            **training,
            **shared,
            "eval_steps": max(1, options.steps // 5),
            "learning_rate": options.learning_rate,
        }
    cell = {"name": "study", "description": arm, "method": training or {"name": "rtn"}}
    return Recipe.model_validate({**cell, "scheme": SCHEMES[scheme]})


def labels(options: argparse.Namespace) -> list[str]:
    """Of all cells; what is not trained does not depend on the seed."""
    return [
        f"{scheme}, {arm}, {seed}"
        for seed in options.seeds
        for scheme in options.schemes
        for arm in options.arms
        if ARMS[arm] is not None or seed == options.seeds[0]
    ]


def data(arm: str, options: argparse.Namespace, seed: int) -> CalibrationSet | None:
    """What an arm trains on, if it has data."""
    size = {"samples": options.samples, "length": options.length}
    if arm == "self-written text":
        return cb.generate(options.model, **size, seed=seed)
    if arm == "real text":
        # Other draws are other rows also of a corpus that is one document.
        return cb.select(options.real, tokenizer=options.model, **size, draw=seed)
    return None


def measure(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """One cell."""
    scheme, arm, seed = label.split(", ")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        begin = time.perf_counter()
        chosen, training_set = recipe(arm, scheme, options, int(seed)), data(arm, options, int(seed))
        cb.compress(options.model, output=output, recipe=chosen, calibration=training_set)
        seconds = time.perf_counter() - begin
        training = json.loads((output / "calibrant.json").read_text())["training"]
        found = on_texts(output, options.model, options.texts, options.windows, options.window)
    return {**found, "training": training, "seconds": seconds}


def of_training(runs: list[dict[str, Any]], divergences: list[float]) -> list[str]:
    """Sharpness, and measured less training divergence; nothing of runs that kept the rounded model."""
    pairs = [
        (run["training"], found)
        for run, found in zip(runs, divergences, strict=True)
        if run["training"] and run["training"]["best"]
    ]
    if not pairs:
        return ["", ""]
    gaps = [found - training["loss"] for training, found in pairs]
    return [spread([training["sharpness"] for training, _ in pairs], 4), spread(gaps, 4)]


def show(runs: dict[str, dict[str, Any]], texts: list[str]) -> None:
    """Means and standard deviations over seeds."""
    names = [Path(text).name for text in texts]
    table = Table("scheme", "arm", "seeds", *[f"KL {name}" for name in names], "sharpness", "texts - training")
    for (scheme, arm), several in over_seeds(runs):
        numbers = [spread([run["kl"][name] for run in several]) for name in names]
        last = of_training(several, [sum(run["kl"].values()) / len(names) for run in several])
        table.add_row(scheme, arm, str(len(several)), *numbers, *last)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--real", required=True, help="text that the real-text arm trains on")
    parser.add_argument("--texts", nargs="+", required=True, help="texts to measure on")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--samples", type=int, default=512, help="rows of the arms that train on text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="tokens of an evaluation window")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if Path(options.real).resolve() in [Path(text).resolve() for text in options.texts]:
        parser.error(f"{options.real}: one arm trains on it, so it is no text to measure on")
    file = options.json or HERE / "results" / f"zsaq_{options.model.resolve().name}.json"
    keys = ("steps", "rows", "length", "learning_rate", "samples", "windows", "window")
    settings = {key: vars(options)[key] for key in keys}
    settings |= {"real": Path(options.real).name, "texts": [Path(text).name for text in options.texts]}
    show(measured(file, settings, labels(options), partial(measure, options=options)), options.texts)


if __name__ == "__main__":
    main()
