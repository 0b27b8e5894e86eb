"""Numbers that describe the tokens of a calibration set (arXiv 2410.17170 §6.3; methods.md §34)."""

import numpy as np

from calibrant.calibration.calibration_set import CalibrationSet

_LONGEST_NGRAM = 4


def token_statistics(calibration: CalibrationSet) -> dict[str, float]:
    """Distinct tokens, repetition within rows and n-gram diversity, over sub-word ids.

    ``repetition``: share of tokens that occur earlier in their row. ``div_token``: mean over n = 1 ... 4 of distinct
    n-grams over n-grams; n-grams do not cross rows (ours).
    """
    tokens = calibration.tokens.numpy()
    new = sum(len(np.unique(row)) for row in tokens)
    shares = []
    for n in range(1, min(_LONGEST_NGRAM, tokens.shape[1]) + 1):
        grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
        shares.append(len(np.unique(grams, axis=0)) / len(grams))
    return {
        "distinct_tokens": float(len(np.unique(tokens))),
        "repetition": 1 - new / tokens.size,
        "div_token": float(np.mean(shares)),
    }
