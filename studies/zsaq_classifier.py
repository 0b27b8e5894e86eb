"""ZSAQ on a classifier: the same arms as for language models, on questions whose subject is asked for.

    python studies/zsaq_classifier.py studies/small_models/bert-classifier \\
        --generator studies/small_models/gpt2-shaped --train test.jsonl.gz --held-out validation.jsonl.gz

The generator is a language model of the same tokenizer. Measured on questions that nothing was trained on: divergence
from the original classifier, accuracy, how often both say the same; and sharpness (on random tokens, in the arms with
data on held-out rows of it). The JSON holds every run; finished runs are kept.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import calibrant as cb
import zsaq
from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.methods.training import Zsaq
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.recipes.recipe import Recipe
from cells import measured, over_seeds, spread
from small_models.data import LENGTH, read_questions
from zsaq import ARMS, SCHEMES, labels, of_training

HERE = Path(__file__).parent


def recipe(arm: str, scheme: str, options: argparse.Namespace, seed: int) -> Recipe:
    """One cell's recipe: that of the study on language models, with another generator."""
    chosen = zsaq.recipe(arm, scheme, options, seed)
    if not isinstance(chosen.training, Zsaq) or chosen.training.inputs == "random":
        return chosen
    training = chosen.training.model_copy(update={"generator": str(options.generator)})
    return chosen.model_copy(update={"method": training})


def questions(file: Path, model: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and labels as ``model`` has them."""
    named = transformers.AutoConfig.from_pretrained(model).id2label
    subjects = [named[index] for index in range(len(named))]
    return read_questions(file, transformers.AutoTokenizer.from_pretrained(model), subjects)


def data(arm: str, options: argparse.Namespace, seed: int) -> CalibrationSet | None:
    """What an arm trains on, if it has data."""
    if arm == "self-written text":
        return cb.generate(options.generator, samples=options.samples, length=LENGTH, seed=seed)
    if arm != "real text":
        return None
    ids, mask, _ = questions(options.train, options.model)
    rows = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[: options.samples]
    manifest = Manifest(
        strategy="questions",
        parameters={},
        seed=seed,
        draw=0,
        samples=len(rows),
        length=LENGTH,
        tokenizer_sha256=Tokenizer(options.model).sha256,
    )
    return CalibrationSet.build(ids[rows], mask[rows].bool(), manifest)


@torch.no_grad()
def answers(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[questions, subjects]`` of a model that computes in float32."""
    model = load_whole(ModelFolder(folder, allow_encoder=True, allow_quantized=True), "cpu", "float32")
    parts = zip(ids.split(64), mask.split(64), strict=True)
    logits = torch.cat([model(input_ids=rows, attention_mask=seen).logits for rows, seen in parts])
    return torch.log_softmax(logits.double(), -1)


def measure(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """One cell."""
    scheme, arm, seed = label.split(", ")
    ids, mask, subjects = questions(options.held_out, options.model)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        begin = time.perf_counter()
        chosen, training_set = recipe(arm, scheme, options, int(seed)), data(arm, options, int(seed))
        cb.compress(options.model, output=output, recipe=chosen, calibration=training_set, allow_encoder=True)
        seconds = time.perf_counter() - begin
        training = json.loads((output / "calibrant.json").read_text())["training"]
        original, found = answers(options.model, ids, mask), answers(output, ids, mask)
    divergence = (original.exp() * (original - found)).sum(-1)
    return {
        "kl": float(divergence.mean()),
        "kl_standard_error": float(divergence.std() / len(divergence) ** 0.5),
        "accuracy": float((found.argmax(-1) == subjects).double().mean()),
        "original_accuracy": float((original.argmax(-1) == subjects).double().mean()),
        "same": float((found.argmax(-1) == original.argmax(-1)).double().mean()),
        "training": training,
        "seconds": seconds,
    }


def show(runs: dict[str, dict[str, Any]]) -> None:
    """Means and standard deviations over seeds."""
    original = next(iter(runs.values()))["original_accuracy"]
    table = Table("scheme", "arm", "seeds", "KL", "accuracy", "same answer", "sharpness", "held out - training")
    for (scheme, arm), several in over_seeds(runs):
        numbers = [spread([run[key] for run in several]) for key in ("kl", "accuracy", "same")]
        last = of_training(several, [run["kl"] for run in several])
        table.add_row(scheme, arm, str(len(several)), *numbers, *last)
    Console(width=150).print(table, f"The original's accuracy is {original:.3f}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--generator", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="questions that the real-text arm trains on")
    parser.add_argument("--held-out", type=Path, required=True, help="questions to measure on")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--samples", type=int, default=512, help="rows of the arms that train on text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.length = LENGTH
    file = options.json or HERE / "results" / f"zsaq_{options.model.resolve().name}.json"
    settings = {key: vars(options)[key] for key in ("steps", "rows", "learning_rate", "samples")}
    settings |= {key: vars(options)[key].resolve().name for key in ("generator", "train", "held_out")}
    show(measured(file, settings, labels(options), partial(measure, options=options)))


if __name__ == "__main__":
    main()
