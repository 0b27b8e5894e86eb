"""``calibrant data select``."""

from typing import Annotated

import typer

from calibrant.cli.console import (
    DeviceOption,
    DrawOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    LengthOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    terminal,
)
from calibrant.cli.data.shared import EmbeddingOption, numbers, save


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
        from calibrant.calibration.select import select as run
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
            progress=screen.progress,
        )
        save(made, output, overwrite, screen)
