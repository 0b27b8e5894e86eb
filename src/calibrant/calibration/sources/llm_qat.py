"""LLM-QAT data: text that a model writes from random tokens (arXiv 2305.17888 and its released code)."""

import numpy as np
import torch
import transformers

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.calibration.sources.text_generation import KeptRows, Sampling, compute_place, write_rows
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress
from calibrant.randomness import make_rng

# Released code: greedy up to the third, fourth or fifth token, then sampling with transformers' default top-k.
_GREEDY_TOKENS = (3, 4, 5)
_TOP_K = 50


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
    kept: KeptRows | None = None,
) -> CalibrationSet:
    """Let ``model`` write texts from one random token each, without BOS (arXiv 2305.17888 and its released code).

    Starts are drawn without replacement from the vocabulary without special tokens. A row is greedy up to its third,
    fourth or fifth token, then sampled with top-k 50. Where a text ends, the next one begins in the same row (ours).
    ``provenance`` is recorded in the manifest; ``kept`` is that of ``write_rows``.
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

    sampling = Sampling(temperatures, top_k=_TOP_K)
    written = write_rows(model, tokenizer, uniforms, beginning, sampling, batch_size, progress, kept)
    manifest = Manifest(
        strategy="llm-qat",
        parameters={"batch_size": batch_size, **compute_place(model)},
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
