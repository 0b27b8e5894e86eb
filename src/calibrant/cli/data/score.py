"""``calibrant data score``."""

from dataclasses import asdict
from typing import Annotated

import typer

from calibrant.cli.console import FieldOption, JsonOption, QuietOption, SeedOption, terminal
from calibrant.cli.data.shared import EmbeddingOption, numbers


def score(
    corpora: Annotated[list[str], typer.Argument(help="Corpora to score, given as for select.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder with the tokenizer.")],
    targets: Annotated[
        list[str],
        typer.Option("--target", help="Text typical of the model's purpose; may be repeated.", show_default=False),
    ],
    weights: Annotated[
        str | None, typer.Option("--weights", help="Weights of the targets, such as 2,1,1; equal by default.")
    ] = None,
    field: FieldOption = "text",
    target_field: Annotated[str, typer.Option("--target-field", help="Field that contains the target texts.")] = "text",
    embedding: EmbeddingOption = "lexical",
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score corpora by their similarity to target texts and their token distribution (COLA, stage 1).

    Example: calibrant data score c4.jsonl.gz wiki.txt -m ./SmolLM2-135M --target questions.jsonl
    """
    with terminal(quiet, as_json) as screen:
        from rich.table import Table
        from rich.text import Text

        import calibrant as cb

        found = cb.score_corpora(
            [cb.Corpus(corpus, field) for corpus in corpora],
            [cb.Corpus(target, target_field) for target in targets],
            tokenizer=model,
            weights=numbers("--weights", weights),
            embedding=embedding,
            seed=seed,
            progress=screen.progress,
        )
        table = Table("corpus", "similarity", "divergence (nats)", "score")
        for one in found:
            table.add_row(Text(one.corpus), *(f"{value:.3f}" for value in (one.similarity, one.divergence, one.score)))
        screen.result({"scores": [asdict(one) for one in found]}, table)
