"""``calibrant prove``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from calibrant.cli.console import (
    AgainstOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    terminal,
)
from calibrant.report.tables import size_text


def prove(
    model: ModelArgument,
    engine: Annotated[
        Literal["transformers", "vllm", "llama.cpp"], typer.Option("--engine", help="Program that loads the model.")
    ] = "transformers",
    python: Annotated[
        Path | None,
        typer.Option("--python", help="Python of the environment that has the engine.", show_default="this one"),
    ] = None,
    against: AgainstOption = None,
    text: Annotated[str, typer.Option("--text", help="Text to compare on: a file, a folder, or builtin.")] = "builtin",
    field: FieldOption = "text",
    length: Annotated[int, typer.Option("--length", "-l", help="Tokens of a window.")] = 64,
    windows: Annotated[int, typer.Option("--windows", help="Windows of the text.")] = 2,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens that the engine writes.")] = 24,
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", help="GGUF file for llama.cpp.", show_default="written now, kept nowhere"),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="Threads of llama.cpp.")] = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Load a model in the program that will serve it, and compare what it computes with what is stored.

    Example: calibrant prove ./w4 --engine vllm --python ./vllm-env/bin/python
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        proof = cb.prove(
            model,
            engine=engine,
            python=python,
            against=against,
            text=cb.Corpus(text, field),
            length=length,
            windows=windows,
            new_tokens=new_tokens,
            gguf=gguf,
            dtype=dtype,
            device=device,
            threads=threads,
            progress=screen.progress,
        )
        lines = [
            f"{proof.engine} {proof.version} computes what is stored in {model}",
            f"log-probabilities: {proof.difference:.2g} nats apart on average over {proof.tokens} tokens "
            f"(allowed {proof.allowed:.2g}), at most {proof.largest:.2g}",
            f"greedy text: {proof.same_tokens} of {proof.new_tokens} tokens the same"
            + (f", then a choice within {proof.margin:.2g}" if proof.margin else ""),
            f"loaded in {proof.load_seconds:.1f} s, {proof.tokens_per_second:.3g} tokens a second, "
            f"{size_text(proof.peak_bytes)} of memory",
        ]
        if proof.kl is not None:
            lines.insert(3, f"divergence from {against}: at least {proof.kl:.3g} nats a token")
        screen.result(asdict(proof), *lines)
