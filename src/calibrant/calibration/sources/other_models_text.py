"""Two more ways to let a model write: from random tokens (LLM-QAT) and from beginnings of real texts ("Beware")."""

import math

import numpy as np
import torch
import transformers

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.sources.text_generation import Sampling, write_rows
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress
from calibrant.randomness import make_rng

# LLM-QAT writes greedily up to the third, fourth or fifth token, then samples with transformers' default top-k.
_GREEDY_TOKENS, _LLM_QAT_TOP_K = (3, 4, 5), 50
_PREFIX_TOKENS = 2
_PREFIX_TEMPERATURE, _PREFIX_TOP_P, _PREFIX_TOP_K, _PREFIX_PENALTY = 0.6, 0.95, 50, 1.2


def generate_llm_qat(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    draw: int,
    batch_size: int,
    progress: Progress,
    provenance: dict[str, str],
) -> CalibrationSet:
    """Texts that start from one random token, without BOS (arXiv 2305.17888, released code; methods.md §25).

    Starts are drawn from the vocabulary without special tokens; a row's first 3 to 5 tokens are the most likely ones,
    then follows sampling with top-k 50. Where a text ends, the next one begins in the same row (ours).
    """
    eligible = [i for i in sorted(tokenizer.hf.get_vocab().values()) if i not in tokenizer.special_ids]
    starts = make_rng(seed, "llm-qat", draw).permutation(eligible)
    uniforms = np.stack([make_rng(seed, "llm-qat", draw, row).random(length) for row in range(samples)])
    greedy = make_rng(seed, "llm-qat-greedy", draw).choice(_GREEDY_TOKENS, samples)
    temperatures = torch.ones(samples, length, dtype=torch.float64)
    for row, count in enumerate(greedy):
        temperatures[row, : count - 1] = 0

    def beginning(row: int, text: int) -> list[int]:
        return [int(starts[(row + text * samples) % len(starts)])]

    sampling = Sampling(temperatures, top_k=_LLM_QAT_TOP_K)
    written = write_rows(model, tokenizer, uniforms, beginning, sampling, batch_size, progress)
    manifest = Manifest(
        strategy="llm-qat",
        parameters={"batch_size": batch_size, **_where(model)},
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_files_sha256=tokenizer.files_sha256,
        model=dict(provenance),
        counts={"generations": written.generations},
    )
    return CalibrationSet.build(written.tokens, torch.ones_like(written.tokens, dtype=torch.bool), manifest)


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
) -> CalibrationSet:
    """Texts that continue the first two tokens of real ones, of which the likeliest are kept (arXiv 2410.17711;
    methods.md §26).

    Temperature 0.6, top-p 0.95, top-k 50, repetition penalty 1.2. Of ``samples / percentile`` rows those strictly below
    the ``percentile`` of perplexity are kept, in order. The perplexity is that of the tokens as they were written, at
    temperature 1; the released code tokenizes the text again (ours).

    Raises:
        CalibrantError: the corpus has fewer documents than rows are written.
    """
    rows = math.ceil(samples * 100 / percentile) + 1
    begins = [tokenizer.hf.bos_token_id] if tokenizer.hf.bos_token_id is not None else []
    prefixes = _prefixes(corpus, tokenizer, _PREFIX_TOKENS - len(begins))
    if len(prefixes) < rows * (draw + 1):
        raise CalibrantError(
            f"{corpus.location}: {len(prefixes)} documents, but draw {draw} of {samples} rows needs "
            f"{rows * (draw + 1)} beginnings; use fewer samples or more text"
        )
    order = make_rng(seed, "prefix").permutation(len(prefixes))
    uniforms = np.stack([make_rng(seed, "prefix", draw, row).random(length) for row in range(rows)])

    def beginning(row: int, text: int) -> list[int]:
        return begins + prefixes[order[(draw * rows + row + text * rows) % len(order)]]

    sampling = Sampling(
        torch.full((length,), _PREFIX_TEMPERATURE, dtype=torch.float64),
        top_k=_PREFIX_TOP_K,
        top_p=_PREFIX_TOP_P,
        repetition_penalty=_PREFIX_PENALTY,
    )
    written = write_rows(model, tokenizer, uniforms, beginning, sampling, batch_size, progress)
    losses = np.array(written.losses)
    kept = np.flatnonzero(losses < np.percentile(losses, percentile))[:samples]
    if len(kept) < samples:
        raise CalibrantError(f"only {len(kept)} of {rows} rows lie below percentile {percentile:g}; raise it")
    manifest = Manifest(
        strategy="prefix",
        parameters={"percentile": percentile, "batch_size": batch_size, **_where(model)},
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_files_sha256=tokenizer.files_sha256,
        corpora=[{**corpus.describe(), "rows": samples}],
        model=dict(provenance),
        counts={"generations": written.generations, "rows_written": rows, "rows_kept": samples},
    )
    tokens = written.tokens[torch.from_numpy(kept)]
    return CalibrationSet.build(tokens, torch.ones_like(tokens, dtype=torch.bool), manifest)


def _where(model: transformers.PreTrainedModel) -> dict[str, str]:
    return {"device": model.device.type, "compute_dtype": str(model.dtype).removeprefix("torch.")}


def _prefixes(corpus: Corpus, tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """The first tokens of every document that has so many."""
    found = []
    for document in corpus:
        ids = tokenizer.encode(document.text[:200])[:count]
        if len(ids) == count:
            found.append(ids)
    return found
