"""``calibrant data``: generate, select, score, rebuild, inspect."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibrant.cli.console import (
    DeviceOption,
    DrawOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    ModelLengthOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    Terminal,
    terminal,
)

if TYPE_CHECKING:
    from calibrant.calibration.calibration_set import CalibrationSet

EmbeddingOption = Annotated[
    str, typer.Option("--embedding", help="lexical (no model), or a sentence-transformers model's folder.")
]

app = typer.Typer(help="Make, choose and look at calibration sets.", no_args_is_help=True, rich_markup_mode="markdown")


@app.command()
def generate(
    model: ModelArgument,
    output: OutputOption,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="self (the model writes from BOS), llm-qat (from random tokens), prefix (from the first tokens of a "
            "corpus's texts), vocabulary (random tokens).",
        ),
    ] = "self",
    samples: SamplesOption = 128,
    length: ModelLengthOption = None,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Temperature (after the first steps); 1 if left out.")
    ] = None,
    initial_temperature: Annotated[
        float | None,
        typer.Option("--initial-temperature", help="Temperature the schedule starts from; left out: no schedule."),
    ] = None,
    temperature_steps: Annotated[
        int | None,
        typer.Option("--temperature-steps", help="Steps from the initial temperature to the final one; 10."),
    ] = None,
    first_tokens: Annotated[
        str, typer.Option("--first-tokens", help="self: any, or english (for multilingual models).")
    ] = "any",
    corpus: Annotated[str | None, typer.Option("--corpus", help="prefix: whose texts' beginnings to continue.")] = None,
    field: FieldOption = "text",
    percentile: Annotated[
        float, typer.Option("--percentile", help="prefix: keep rows below this percentile of perplexity.")
    ] = 80.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows generated at a time.")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a calibration set without any corpus.

    Example: calibrant data generate ./SmolLM2-135M -o ./set --samples 128 --length 512
    """
    with terminal(quiet, as_json) as screen:
        from calibrant.calibration.corpus import Corpus
        from calibrant.calibration.making import generate as run
        from calibrant.calibration.sources.self_calibration import TemperatureSchedule
        from calibrant.errors import CalibrantError
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [model] if corpus is None else [model, corpus])
        if temperature_steps is not None and initial_temperature is None:
            raise CalibrantError("--temperature-steps lead from an --initial-temperature: name it too")
        final = 1.0 if temperature is None else temperature
        schedule = None if temperature is None else TemperatureSchedule(final, final, 0)
        if initial_temperature is not None:
            schedule = TemperatureSchedule(initial_temperature, final, 10 if temperature_steps is None else temperature_steps)
        made = run(
            model,
            strategy=strategy,
            samples=samples,
            length=length,
            seed=seed,
            draw=draw,
            temperature=schedule,
            first_tokens=first_tokens,  # type: ignore[arg-type]  # checked by generate, which names the choices
            corpus=Corpus(corpus, field) if corpus is not None else None,
            percentile=percentile,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        _save(made, output, overwrite, screen)


@app.command()
def select(
    corpora: Annotated[
        list[str],
        typer.Argument(
            help="Files (.txt, .jsonl, .parquet, or .gz of these), folders, hub:owner/name or builtin.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Model folder: its tokenizer is used, and by perplexity and cola the model itself."
        ),
    ],
    output: OutputOption,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="uniform; zipcal (covers the vocabulary), zipcal-multi (in each corpus, then spread out); zipf (rare "
            "words); unigram (words in random order); perplexity; k-centre, herding (by embeddings); cola (by the "
            "model's activations).",
        ),
    ] = "uniform",
    windows: Annotated[
        str,
        typer.Option(
            "--windows",
            help="pack (join documents, cut), window (one of each long enough document) or document (its beginning).",
        ),
    ] = "pack",
    field: FieldOption = "text",
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    shards: Annotated[
        int, typer.Option("--shards", help="Disjoint random parts of the corpus; draw k of a strategy sees part k.")
    ] = 1,
    parts: Annotated[
        int | None, typer.Option("--parts", help="zipcal: two rounds over so many random parts of the corpus.")
    ] = None,
    executor: Annotated[
        str,
        typer.Option("--executor", help="Where parts run: local, or ray (one for each processor)."),
    ] = "local",
    pool: Annotated[
        int | None,
        typer.Option("--pool", help="zipcal: look at this many random candidates a pick (paper's code: 2000)."),
    ] = None,
    keep: Annotated[str, typer.Option("--keep", help="perplexity: lowest, middle or below (a percentile).")] = "below",
    percentile: Annotated[
        float, typer.Option("--percentile", help="perplexity, below: keep candidates under it.")
    ] = 80.0,
    embedding: EmbeddingOption = "lexical",
    mask: Annotated[
        str, typer.Option("--mask", help="Tokens that count: all, assistant (of conversations) or no-special.")
    ] = "all",
    weights: Annotated[
        str | None, typer.Option("--weights", help="Shares of the samples for several corpora: 2,1,1.")
    ] = None,
    mix_scripts: Annotated[
        str | None, typer.Option("--mix-scripts", help="Share the rows between scripts: latin,cyrillic,cjk.")
    ] = None,
    mix_lengths: Annotated[
        str | None,
        typer.Option("--mix-lengths", help="Share the rows between documents split at these characters: 1000,10000."),
    ] = None,
    mix_weights: Annotated[
        str | None, typer.Option("--mix-weights", help="Shares of a mix's groups: 2,1,1; left out, equal ones.")
    ] = None,
    duplicates: Annotated[
        str, typer.Option("--duplicates", help="keep them, or drop exact or near (and exact) ones.")
    ] = "keep",
    min_characters: Annotated[int, typer.Option("--min-characters", help="Drop shorter documents.")] = 0,
    max_characters: Annotated[int | None, typer.Option("--max-characters", help="Drop longer documents.")] = None,
    max_repetition: Annotated[
        float | None,
        typer.Option("--max-repetition", help="Drop documents with a larger share of repeated runs of ten words."),
    ] = None,
    script: Annotated[
        str | None, typer.Option("--script", help="Keep documents of one script: latin, cyrillic, arabic, cjk, ...")
    ] = None,
    leakage: Annotated[
        list[str] | None,
        typer.Option("--leakage", help="Evaluation text; documents that share a run of words with it are dropped."),
    ] = None,
    leakage_field: Annotated[str, typer.Option("--leakage-field", help="Field of the evaluation texts.")] = "text",
    leakage_run: Annotated[int, typer.Option("--leakage-run", help="Words of such a run.")] = 13,
    keep_leaked: Annotated[bool, typer.Option("--keep-leaked", help="Count documents with leakage only.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pick a calibration set out of corpora.

    Example: calibrant data select c4.jsonl.gz -m ./SmolLM2-135M -o ./set --strategy zipcal --duplicates near
    """
    with terminal(quiet, as_json) as screen:
        from calibrant.calibration.corpus import Corpus
        from calibrant.calibration.making import select as run
        from calibrant.calibration.selection.request import filter_request, mix_request
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [*corpora, model])
        made = run(
            [Corpus(corpus, field) for corpus in corpora],
            tokenizer=model,
            strategy=strategy,  # type: ignore[arg-type]  # checked by the request, which names the choices
            samples=samples,
            length=length,
            seed=seed,
            draw=draw,
            windows=windows,  # type: ignore[arg-type]  # the same
            shards=shards,
            parts=parts,
            executor=executor,  # type: ignore[arg-type]  # the same
            pool=pool,
            keep=keep,  # type: ignore[arg-type]  # the same
            percentile=percentile,
            embedding=embedding,
            mask=mask,  # type: ignore[arg-type]  # the same
            weights=_numbers("--weights", weights),
            mix=mix_request(
                scripts=mix_scripts.split(",") if mix_scripts else [],
                lengths=_numbers("--mix-lengths", mix_lengths) or [],
                weights=_numbers("--mix-weights", mix_weights),
            ),
            filters=filter_request(
                duplicates=duplicates,
                min_characters=min_characters,
                max_characters=max_characters,
                max_repetition=max_repetition,
                script=script,
                leakage=leakage or [],
                leakage_field=leakage_field,
                leakage_run=leakage_run,
                keep_leaked=keep_leaked,
            ),
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        _save(made, output, overwrite, screen)


def _numbers(option: str, text: str | None) -> list[float] | None:
    from calibrant.errors import CalibrantError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise CalibrantError(f"{option} {text}: numbers with commas between are expected, like 2,1,1") from error


@app.command()
def score(
    corpora: Annotated[list[str], typer.Argument(help="Corpora to score, as for select.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder whose tokenizer is used.")],
    targets: Annotated[
        list[str], typer.Option("--target", help="Text of what the model is for; may be repeated.", show_default=False)
    ],
    weights: Annotated[str | None, typer.Option("--weights", help="How much each target counts: 2,1,1.")] = None,
    field: FieldOption = "text",
    target_field: Annotated[str, typer.Option("--target-field", help="Field of the targets' texts.")] = "text",
    embedding: EmbeddingOption = "lexical",
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say which corpora fit a purpose: likeness to target texts and their token distribution (COLA, stage 1).

    Example: calibrant data score c4.jsonl.gz wiki.txt -m ./SmolLM2-135M --target questions.jsonl
    """
    with terminal(quiet, as_json) as screen:
        from rich.table import Table
        from rich.text import Text

        from calibrant.calibration.corpus import Corpus
        from calibrant.calibration.selection.corpus_scores import score_corpora

        found = score_corpora(
            [Corpus(corpus, field) for corpus in corpora],
            [Corpus(target, target_field) for target in targets],
            tokenizer=model,
            weights=_numbers("--weights", weights),
            embedding=embedding,
            seed=seed,
            progress=screen.progress,
        )
        table = Table("corpus", "similarity", "divergence (nats)", "score")
        for one in found:
            table.add_row(Text(one.corpus), *(f"{value:.3f}" for value in (one.similarity, one.divergence, one.score)))
        screen.result({"scores": [asdict(one) for one in found]}, table)


@app.command()
def rebuild(
    manifest: Annotated[Path, typer.Argument(help="Manifest, or folder of the set.", show_default=False)],
    output: OutputOption,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model, if it is not where the manifest says.")
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option("--corpus", help="The corpus, if it is not where the manifest says.")
    ] = None,
    leakage: Annotated[
        list[str] | None, typer.Option("--leakage", help="Evaluation text, if it is not where the manifest says.")
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a calibration set again, byte for byte, from its manifest; say what changed where that fails.

    Example: calibrant data rebuild ./set/manifest.json -o ./again
    """
    with terminal(quiet, as_json) as screen:
        from calibrant.calibration.making import rebuild as run
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [manifest])
        again = run(manifest, model=model, corpora=corpus, leakage=leakage, progress=screen.progress)
        for change in again.changes:
            screen.note(f"changed, without effect on the tokens: {change}")
        _save(again.calibration, output, overwrite, screen)


@app.command()
def inspect(
    folders: Annotated[list[Path], typer.Argument(help="Calibration set folders.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model folder whose tokenizer reads the rows; else where a manifest says."),
    ] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Also run the model over the sets, for perplexities.")
    ] = False,
    html: Annotated[
        Path,
        typer.Option("--html", help="Page to write (an earlier page is replaced): curves, overlap, odd rows, samples."),
    ] = Path("inspection.html"),
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show as text in the terminal.")] = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is in calibration sets, side by side, and write a page about them.

    Example: calibrant data inspect ./self ./c4 -m ./SmolLM2-135M --perplexity --html sets.html
    """
    with terminal(quiet, as_json) as screen:
        from rich.markup import escape
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        from calibrant.output_folder import whole_file
        from calibrant.report.inspection import check_page, inspect_sets

        check_page(html)
        found = inspect_sets(
            folders, model=model, perplexity=perplexity, device=device, dtype=dtype, progress=screen.progress
        )
        page = found.page()
        with whole_file(html) as beside:
            beside.write_text(page, encoding="utf-8")
        table = Table("", *(escape(one.name) for one in found.sets))
        for name in found.sets[0].statistics.numbers:
            values = [one.statistics.numbers[name] for one in found.sets]
            table.add_row(Text(name, style="bold"), *map(_number_text, values))
        odd = [
            Text(f"{one.name}, row {row.row}: {'; '.join(row.reasons)}")
            for one in found.sets
            for row in one.statistics.odd[:3]
        ]
        panels = [
            Panel(Text(text), title=Text(f"{one.name}, row {index}"))
            for one in found.sets
            for index, text in enumerate(one.texts[:rows])
        ]
        screen.result(found.as_json(), table, *odd, *panels, Text(f"page: {html}"))


def _number_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _save(made: "CalibrationSet", output: Path, overwrite: bool, screen: Terminal) -> None:
    from calibrant.output_folder import staged

    with staged(output, overwrite) as folder:
        made.save(folder)
    _show(made, screen, output)


def _show(made: "CalibrationSet", screen: Terminal, output: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    manifest = made.manifest
    facts: dict[str, Any] = {
        "strategy": manifest.strategy,
        "samples": manifest.samples,
        "length": manifest.length,
        "seed": manifest.seed,
        "draw": manifest.draw,
        "parameters": manifest.parameters,
        **manifest.counts,
        "set_sha256": manifest.set_sha256,
    }
    table = Table(title=Text(str(output)), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    screen.result({**facts, "corpora": manifest.corpora}, table)
