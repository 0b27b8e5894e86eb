"""``calibrant demo``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import JsonOption, QuietOption, SeedOption, terminal
from calibrant.user_cache import USER_CACHE

_RECIPES = ("gptq-w4a16-g64", "wanda-2:4")
# Enough to tell the recipes apart, in a few minutes on two cores with AVX2.
_SAMPLES, _LENGTH, _WINDOWS = 32, 256, 8
_PROMPT = "The three most important things about the sea are"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the compressed models.")] = Path(
        "demo-output"
    ),
    cache: Annotated[
        Path, typer.Option("--cache", help="Folder in which the demo model is unpacked, once.")
    ] = USER_CACHE,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress SmolLM2-135M with two recipes, on a calibration set that it generates, and compare the results.

    Example: calibrant demo
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        from rich.panel import Panel
        from rich.text import Text

        import calibrant as cb
        from calibrant.cli.compress import summary
        from calibrant.cli.evaluate import evaluation_table
        from calibrant.modeling.demo_model import demo_model

        model = demo_model(cache, screen.progress)
        screen.note(f"model: SmolLM2-135M-Instruct in {model}")
        screen.note(f"the model generates a calibration set: {_SAMPLES} rows of {_LENGTH} tokens")
        made = cb.generate(model, samples=_SAMPLES, length=_LENGTH, seed=seed, progress=screen.progress)
        samples = {"original": _continued(model)}
        targets = {recipe: output / recipe.replace(":", "-") for recipe in _RECIPES}
        for recipe, target in targets.items():
            screen.note(f"compressing with {recipe} into {target}")
            report = cb.compress(
                model, output=target, recipe=recipe, calibration=made, overwrite=True, progress=screen.progress
            )
            if not as_json:
                screen.result({}, *summary(report))
            samples[recipe] = _continued(target)
        screen.note(f"comparing both with the original on {_WINDOWS} windows of the built-in text")
        compared = cb.compare(
            list(targets.values()),
            against=model,
            text="builtin",
            limit=_WINDOWS,
            dtype="auto",
            progress=screen.progress,
        )
        evaluations = dict(zip(_RECIPES, compared.evaluations.values(), strict=True))
        panels = [Panel(Text(text), title=name) for name, text in samples.items()]
        screen.result(
            {"evaluations": {name: asdict(found) for name, found in evaluations.items()}, "samples": samples},
            evaluation_table(evaluations, "builtin"),
            *panels,
        )
        screen.note(
            "the original was decoded from 4 bits (Q4_1), so compare recipes, not absolute losses\n"
            f"the models are in {output}; next: calibrant compress demo -r best-w4a16 -o OUT, or another model"
        )


def _continued(folder: Path) -> str:
    from calibrant.evaluation.samples import continuations
    from calibrant.modeling.checkpoint import ModelFolder
    from calibrant.progress import NoProgress

    (text,) = continuations(ModelFolder(folder, allow_quantized=True), [_PROMPT], "cpu", "float32", NoProgress())
    return _PROMPT + text
