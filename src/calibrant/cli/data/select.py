"""``calibrant data select``."""

from contextlib import nullcontext
from typing import Annotated

import typer

from calibrant.cli.console import (
    DeviceOption,
    DrawOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    terminal,
)
from calibrant.cli.data.shared import EmbeddingOption, numbers, show
from calibrant.stopping import stopping_gently

# Panels of --help.
_STRATEGY = "Options of single strategies"
_MIXING = "Several corpora, and mixes"
_FILTERS = "Filters of documents"


def select(
    corpora: Annotated[
        list[str],
        typer.Argument(
            help="Files (.txt, .jsonl, .parquet, also with .gz), folders, hub:owner/name or builtin.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Model folder; strategies use its tokenizer, perplexity, cola and acdm also run the model.",
        ),
    ],
    output: OutputOption,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="uniform; zipcal (covers the vocabulary), zipcal-multi (zipcal in each corpus, then k-centre); zipf "
            "(rare words); unigram (words in random order), words_dataset (the same as ZipCal's released code does "
            "it); perplexity; k-centre, also k-center, and herding (by embeddings); cola (by the model's activations); "
            "acdm (activations like those of --target).",
        ),
    ] = "uniform",
    windows: Annotated[
        str,
        typer.Option(
            "--windows",
            help="pack (join documents, then cut), window (one per document that is long enough) or document (its "
            "beginning).",
        ),
    ] = "pack",
    field: FieldOption = "text",
    samples: SamplesOption = 128,
    length: Annotated[
        int | None, typer.Option("--length", "-l", help="Tokens per row; 512 by default, 128 for words_dataset.")
    ] = None,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            help="uniform, unigram and words_dataset: rows between the beginnings of draws; 128 by default, or the "
            "number of samples if that is more. Sets of one draw and stride are nested.",
            rich_help_panel=_STRATEGY,
        ),
    ] = None,
    shards: Annotated[
        int,
        typer.Option("--shards", help="Number of disjoint random parts of the corpus; draw k sees part k."),
    ] = 1,
    parts: Annotated[
        int | None,
        typer.Option(
            "--parts",
            help="zipcal: select in this many random parts of the corpus, then among their choices.",
            rich_help_panel=_STRATEGY,
        ),
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            "--executor", help="Where parts run: local, or ray (one part per processor).", rich_help_panel=_STRATEGY
        ),
    ] = "local",
    pool: Annotated[
        int | None,
        typer.Option(
            "--pool",
            help="zipcal: consider this many random candidates per pick (the paper's code: 2000); all by default.",
            rich_help_panel=_STRATEGY,
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option("--keep", help="perplexity: lowest, middle, or below (a percentile).", rich_help_panel=_STRATEGY),
    ] = "below",
    percentile: Annotated[
        float,
        typer.Option(
            "--percentile",
            help="perplexity with --keep below: the percentile, in (0, 100].",
            rich_help_panel=_STRATEGY,
        ),
    ] = 80.0,
    embedding: EmbeddingOption = "lexical",
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="acdm: text typical of the model's purpose; may be repeated.", rich_help_panel=_STRATEGY
        ),
    ] = None,
    target_field: Annotated[
        str, typer.Option("--target-field", help="Field that contains the target texts.", rich_help_panel=_STRATEGY)
    ] = "text",
    mask: Annotated[
        str,
        typer.Option(
            "--mask", help="Tokens that count: all, assistant (those of the assistant in conversations) or no-special."
        ),
    ] = "all",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", help="Shares of several corpora, such as 2,1,1; equal by default.", rich_help_panel=_MIXING
        ),
    ] = None,
    mix_scripts: Annotated[
        str | None,
        typer.Option(
            "--mix-scripts", help="Divide the rows among scripts, such as latin,cyrillic,cjk.", rich_help_panel=_MIXING
        ),
    ] = None,
    mix_lengths: Annotated[
        str | None,
        typer.Option(
            "--mix-lengths",
            help="Divide the rows among lengths of documents, bounds in characters, such as 1000,10000.",
            rich_help_panel=_MIXING,
        ),
    ] = None,
    mix_weights: Annotated[
        str | None,
        typer.Option(
            "--mix-weights", help="Shares of a mix's groups, such as 2,1,1; equal by default.", rich_help_panel=_MIXING
        ),
    ] = None,
    duplicates: Annotated[
        str,
        typer.Option(
            "--duplicates",
            help="Duplicates: keep all, or drop exact ones or near ones (near includes exact).",
            rich_help_panel=_FILTERS,
        ),
    ] = "keep",
    min_characters: Annotated[
        int, typer.Option("--min-characters", help="Drop shorter documents.", rich_help_panel=_FILTERS)
    ] = 0,
    max_characters: Annotated[
        int | None, typer.Option("--max-characters", help="Drop longer documents.", rich_help_panel=_FILTERS)
    ] = None,
    max_repetition: Annotated[
        float | None,
        typer.Option(
            "--max-repetition",
            help="Drop documents with a larger share of repeated 10-grams of words.",
            rich_help_panel=_FILTERS,
        ),
    ] = None,
    script: Annotated[
        str | None,
        typer.Option(
            "--script",
            help="Keep only documents in this script: latin, cyrillic, arabic, cjk, ...",
            rich_help_panel=_FILTERS,
        ),
    ] = None,
    leakage: Annotated[
        list[str] | None,
        typer.Option(
            "--leakage",
            help="Evaluation text; drop documents that share a run of words with it. May be repeated.",
            rich_help_panel=_FILTERS,
        ),
    ] = None,
    leakage_field: Annotated[
        str, typer.Option("--leakage-field", help="Field that contains the evaluation text.", rich_help_panel=_FILTERS)
    ] = "text",
    leakage_run: Annotated[
        int, typer.Option("--leakage-run", help="Length of the shared run in words.", rich_help_panel=_FILTERS)
    ] = 13,
    keep_leaked: Annotated[
        bool,
        typer.Option(
            "--keep-leaked", help="Keep documents with leakage and only count them.", rich_help_panel=_FILTERS
        ),
    ] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Select a calibration set from corpora.

    If a selection that runs the model is interrupted, the same command continues with the missing scores.

    Example: calibrant data select c4.jsonl.gz -m ./SmolLM2-135M -o ./set --strategy zipcal --duplicates near
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb
        from calibrant.calibration.selection.request import filter_request, mix_request
        from calibrant.calibration.selection.selecting import WITH_MODEL
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [*corpora, model])  # before corpora are opened
        # Without the scores of a model there is nothing to keep, so a signal stops at once.
        scores = strategy in WITH_MODEL
        with stopping_gently(screen.note) if scores else nullcontext():
            made = cb.select(
                [cb.Corpus(corpus, field) for corpus in corpora],
                tokenizer=model,
                strategy=strategy,  # type: ignore[arg-type]  # checked by the request, which names the choices
                samples=samples,
                length=length,
                seed=seed,
                draw=draw,
                stride=stride,
                windows=windows,  # type: ignore[arg-type]  # likewise
                shards=shards,
                parts=parts,
                executor=executor,  # type: ignore[arg-type]  # likewise
                pool=pool,
                keep=keep,  # type: ignore[arg-type]  # likewise
                percentile=percentile,
                embedding=embedding,
                targets=targets or [],
                target_field=target_field,
                mask=mask,  # type: ignore[arg-type]  # likewise
                weights=numbers("--weights", weights),
                mix=mix_request(
                    scripts=mix_scripts.split(",") if mix_scripts else [],
                    lengths=numbers("--mix-lengths", mix_lengths) or [],
                    weights=numbers("--mix-weights", mix_weights),
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
                output=output,
                overwrite=overwrite,
                progress=screen.progress,
            )
        show(made, screen, output)
