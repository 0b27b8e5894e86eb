"""The vocabulary source: token ids drawn uniformly from the vocabulary (arXiv 2410.17170)."""

import numpy as np
import torch

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.randomness import make_rng


def draw_vocabulary(tokenizer: Tokenizer, *, samples: int, length: int, seed: int, draw: int) -> CalibrationSet:
    """``samples`` rows of ``length`` ids, independent and uniform over the vocabulary without special tokens.

    No BOS is added (ours). Row ``i`` has its own generator, so a smaller set is a prefix of a larger one.
    """
    special = tokenizer.special_ids
    eligible = np.array([i for i in sorted(tokenizer.hf.get_vocab().values()) if i not in special], dtype=np.int32)
    rows = [
        eligible[make_rng(seed, "vocabulary", draw, row).integers(0, len(eligible), length)] for row in range(samples)
    ]
    tokens = torch.from_numpy(np.stack(rows))
    manifest = Manifest(
        strategy="vocabulary",
        parameters={"eligible_tokens": len(eligible)},
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_files_sha256=tokenizer.files_sha256,
    )
    return CalibrationSet.build(tokens, torch.ones_like(tokens, dtype=torch.bool), manifest)
