"""Text that continues the beginnings of real texts, filtered by perplexity (arXiv 2410.17711 and its released code)."""

import math

import numpy as np
import torch
import transformers

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.calibration.corpus import Corpus, corpus_record
from calibrant.calibration.sources.text_generation import KeptRows, Sampling, compute_place, write_rows
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress
from calibrant.randomness import make_rng

_PREFIX_TOKENS = 2
# Released code.
_TEMPERATURE, _TOP_P, _TOP_K, _PENALTY = 0.6, 0.95, 50, 1.2


def generate_from_prefixes(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    samples: int,
    length: int,
    seed: int,
    draw: int,
    percentile: float,
    batch_size: int,
    progress: Progress,
    provenance: dict[str, str],
    kept: KeptRows | None = None,
) -> CalibrationSet:
    """Let ``model`` continue the first two tokens of real texts, BOS included, and keep the likeliest rows.

    Temperature 0.6, top-p 0.95, top-k 50, repetition penalty 1.2 (arXiv 2410.17711, released code). About
    ``100 samples / percentile`` rows are written, and the first ``samples`` strictly below the ``percentile`` of
    perplexity are kept. The perplexity is that of the tokens as written, at temperature 1 (ours; the released code
    tokenizes the text again). ``provenance`` is recorded in the manifest; ``kept`` is that of ``write_rows``.

    Raises:
        CalibrantError: the corpus has fewer documents than rows are written, or too few rows are below the percentile.
    """
    rows = math.ceil(samples * 100 / percentile) + 1
    bos = [tokenizer.hf.bos_token_id] if tokenizer.hf.bos_token_id is not None else []
    prefixes = _prefixes(corpus, tokenizer, _PREFIX_TOKENS - len(bos))
    if len(prefixes) < rows * (draw + 1):
        raise CalibrantError(
            f"{corpus.location}: {len(prefixes)} documents, but draw {draw} of {samples} rows needs "
            f"{rows * (draw + 1)} beginnings; use fewer samples or more text"
        )
    for note in corpus.notes:
        progress.note(note)
    order = make_rng(seed, "prefix").permutation(len(prefixes))
    uniforms = np.stack([make_rng(seed, "prefix", draw, row).random(length) for row in range(rows)])

    def beginning(row: int, text: int) -> list[int]:
        return bos + prefixes[order[(draw * rows + row + text * rows) % len(order)]]

    sampling = Sampling(
        torch.full((length,), _TEMPERATURE, dtype=torch.float64),
        top_k=_TOP_K,
        top_p=_TOP_P,
        repetition_penalty=_PENALTY,
    )
    written = write_rows(model, tokenizer, uniforms, beginning, sampling, batch_size, progress, kept)
    losses = np.array(written.losses)
    likely = np.flatnonzero(losses < np.percentile(losses, percentile))[:samples]
    if len(likely) < samples:
        raise CalibrantError(
            f"only {len(likely)} of {rows} rows are below percentile {percentile:g}; raise `percentile`"
        )
    manifest = Manifest(
        strategy="prefix",
        parameters={"percentile": percentile, "batch_size": batch_size, **compute_place(model)},
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_files_sha256=tokenizer.files_sha256,
        corpora=[corpus_record(corpus, samples, corpus.first_unusable)],
        model=dict(provenance),
        counts={"generations": written.generations, "rows_written": rows, "rows_kept": samples},
    )
    tokens = written.tokens[torch.from_numpy(likely)]
    return CalibrationSet.build(tokens, torch.ones_like(tokens, dtype=torch.bool), manifest)


def _prefixes(corpus: Corpus, tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """The first ``count`` tokens of every document with at least that many."""
    found = []
    for document in corpus:
        ids = tokenizer.encode(document.text[:200])[:count]
        if len(ids) == count:
            found.append(ids)
    return found
