"""``calibrant demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibrant.cli.console import JsonOption, QuietOption, SeedOption, terminal
from calibrant.user_cache import USER_CACHE

if TYPE_CHECKING:
    from calibrant import Evaluation

_RECIPES = ("gptq-w4a16-g64", "wanda-2:4")
_SAMPLES, _LENGTH, _WINDOWS = 64, 256, 16
_NEW_TOKENS = 48
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
        evaluations: dict[str, Evaluation] = {}
        samples = {"original": continue_text(model, _PROMPT)}
        for recipe in _RECIPES:
            target = output / recipe.replace(":", "-")
            screen.note(f"compressing with {recipe} into {target}")
            report = cb.compress(
                model, output=target, recipe=recipe, calibration=made, overwrite=True, progress=screen.progress
            )
            if not as_json:
                screen.result({}, *summary(report))
            evaluations[recipe] = cb.evaluate(
                target, against=model, text="builtin", limit=_WINDOWS, dtype="auto", progress=screen.progress
            )
            samples[recipe] = continue_text(target, _PROMPT)
        panels = [Panel(Text(text), title=name) for name, text in samples.items()]
        screen.result(
            {"evaluations": {name: asdict(found) for name, found in evaluations.items()}, "samples": samples},
            evaluation_table(evaluations),
            *panels,
        )


def continue_text(folder: Path, prompt: str) -> str:
    """Greedy continuation of ``prompt`` by the model in ``folder``."""
    import torch
    import transformers

    from calibrant.modeling.quietly import quietly

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": _NEW_TOKENS, "pad_token_id": tokenizer.eos_token_id}
    with quietly(), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()
        tokens = model.generate(**inputs, **settings)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
