"""Statistics of a calibration set (arXiv 2410.17170 §6.3), and its outlying rows."""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrant.calibration.calibration_set import CalibrationSet

_LONGEST_NGRAM = 4
# What the names of a set's numbers mean, for readers.
NUMBER_LABELS = {
    "rows": "rows",
    "tokens": "counted tokens",
    "perplexity": "perplexity under the model, mean of the rows",
    "repetition": "tokens that occur earlier in their row, share",
    "distinct_tokens": "distinct tokens",
    "coverage": "vocabulary covered, share",
    "div_token": "diversity of token n-grams (1: none repeats)",
    "zipf_token": "Zipf slope of tokens, least squares",
    "zipf_token_ml": "Zipf slope of tokens, maximum likelihood",
    "distinct_words": "distinct words",
    "div_word": "diversity of word n-grams (1: none repeats)",
    "zipf_word": "Zipf slope of words, least squares",
    "zipf_word_ml": "Zipf slope of words, maximum likelihood",
    "letters": "letters among characters, share",
}
# A row is odd if one of its numbers is this many robust standard deviations from the set's median (Iglewicz and Hoaglin
# 1993 recommend 3.5).
_ODD_SCORE = 3.5
# Standard deviation of normal data over their median absolute deviation.
_NORMAL_SPREAD = 1.4826


@dataclass(frozen=True)
class RowNumbers:
    """Numbers of one row: counted tokens, share of repeated tokens, share of non-letter characters, perplexity."""

    tokens: int
    repetition: float
    non_letters: float
    perplexity: float | None


@dataclass(frozen=True)
class OddRow:
    """A row that differs from the others, and the reasons as phrases."""

    row: int
    reasons: list[str]


@dataclass(frozen=True)
class SetStatistics:
    """Statistics of a set.

    Attributes:
        numbers: values by name, None where there is no value.
        rows: one entry per row.
        odd: rows that differ from the others, those with the most reasons first.
        token_frequencies: occurrences of every id in the set in falling order, int64 ``[distinct ids]``.
        coverage_growth: number of distinct ids after each row, int64 ``[rows]``.
    """

    numbers: dict[str, float | None]
    rows: list[RowNumbers]
    odd: list[OddRow]
    token_frequencies: np.ndarray
    coverage_growth: np.ndarray


def describe_set(
    calibration: CalibrationSet, texts: Sequence[str], vocabulary: int, losses: Sequence[float] | None
) -> SetStatistics:
    """Statistics of the counted tokens of a set.

    Args:
        calibration: the set.
        texts: the text of every row.
        vocabulary: number of ids the tokenizer knows, special ones included.
        losses: mean negative log-likelihood of every row under a model in nats, None without a model.

    Names: ``perplexity`` is the mean of the rows' perplexities; ``repetition`` the share of tokens that occur earlier
    in their row; ``coverage`` distinct ids over ``vocabulary``; ``div_*`` the mean over n = 1 ... 4 of distinct n-grams
    over n-grams; ``zipf_*`` the exponent of frequency against rank by least squares on the logarithms, ``zipf_*_ml`` by
    maximum likelihood on the observed ranks. ``*_token`` counts ids, ``*_word`` words split at white space. n-grams do
    not cross rows (ours).
    """
    tokens = [
        row[kept].tolist() for row, kept in zip(calibration.tokens.numpy(), calibration.mask.numpy(), strict=True)
    ]
    words = [text.split() for text in texts]
    token_counts = Counter(token for row in tokens for token in row)
    word_counts = Counter(word for row in words for word in row)
    known = losses if losses is not None else [math.nan] * len(tokens)
    rows = [
        RowNumbers(len(row), _repetition(row), _non_letters(text), _perplexity(loss))
        for row, text, loss in zip(tokens, texts, known, strict=True)
    ]
    counted = sum(map(len, tokens))
    perplexities = [row.perplexity for row in rows if row.perplexity is not None]
    numbers: dict[str, float | None] = {
        "rows": len(rows),
        "tokens": counted,
        "perplexity": float(np.mean(perplexities)) if perplexities else None,
        "repetition": sum(row.repetition * row.tokens for row in rows) / counted if counted else None,
        "distinct_tokens": len(token_counts),
        "coverage": len(token_counts) / vocabulary,
        "div_token": ngram_diversity(tokens),
        "zipf_token": zipf_exponent(token_counts),
        "zipf_token_ml": zipf_likelihood(token_counts),
        "distinct_words": len(word_counts),
        "div_word": ngram_diversity(words),
        "zipf_word": zipf_exponent(word_counts),
        "zipf_word_ml": zipf_likelihood(word_counts),
        "letters": 1 - _non_letters("".join(texts)),
    }
    frequencies = np.array(sorted(token_counts.values(), reverse=True), dtype=np.int64)
    return SetStatistics(numbers, rows, odd_rows(rows), frequencies, _coverage_growth(tokens))


def ngram_diversity(rows: Sequence[Sequence[Hashable]]) -> float | None:
    """Mean over n = 1 ... 4 of distinct n-grams over n-grams; None if all rows are empty."""
    shares = []
    for n in range(1, _LONGEST_NGRAM + 1):
        grams = [gram for row in rows for gram in zip(*(row[i:] for i in range(n)), strict=False)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else None


def zipf_exponent(counts: Counter[Any]) -> float | None:
    """Minus the slope of log frequency on log rank, least squares over all types; None for fewer than two."""
    if len(counts) < 2:
        return None
    frequencies = np.sort(np.fromiter(counts.values(), dtype=np.float64))[::-1]
    return -float(np.polyfit(np.log(np.arange(1, len(frequencies) + 1)), np.log(frequencies), 1)[0])


def zipf_likelihood(counts: Counter[Any]) -> float | None:
    """Maximum-likelihood exponent ``s`` of ranks with probability ``r^-s / sum_k k^-s``; None for fewer than two."""
    from scipy import optimize  # imported here, since it is slow to load

    if len(counts) < 2:
        return None
    frequencies = np.sort(np.fromiter(counts.values(), dtype=np.float64))[::-1]
    ranks = np.log(np.arange(1, len(frequencies) + 1))
    weighted = float(frequencies @ ranks) / float(frequencies.sum())

    def loss(exponent: float) -> float:
        return exponent * weighted + math.log(np.exp(-exponent * ranks).sum())

    return float(optimize.minimize_scalar(loss, bounds=(0.0, 10.0), method="bounded").x)


def odd_rows(rows: Sequence[RowNumbers]) -> list[OddRow]:
    """Rows with a number far from the median: robust z-scores by the median absolute deviation."""
    measures = {
        "repetition": ([row.repetition for row in rows], 0.01),
        "share of characters that are no letters": ([row.non_letters for row in rows], 0.01),
        "logarithm of the perplexity": ([_log(row.perplexity) for row in rows], 0.1),
        "counted tokens": ([float(row.tokens) for row in rows], 1.0),
    }
    reasons: dict[int, list[str]] = {}
    for name, (values, least) in measures.items():
        known = np.array(values, dtype=np.float64)
        if not np.isfinite(known).any():
            continue
        median = float(np.nanmedian(known))
        spread = _NORMAL_SPREAD * float(np.nanmedian(np.abs(known - median)))
        # Where most rows are alike, the deviation is near 0, and every small difference would count.
        scores = (known - median) / max(spread, least)
        for index in np.flatnonzero(np.abs(scores) > _ODD_SCORE):
            reasons.setdefault(int(index), []).append(f"{name} {known[index]:.3g}, median {median:.3g}")
    return [OddRow(row, phrases) for row, phrases in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))]


def overlap(left: CalibrationSet, right: CalibrationSet) -> dict[str, float]:
    """Overlap of two sets: number of equal rows, Jaccard indices of the distinct ids and of the source documents."""

    def rows(calibration: CalibrationSet) -> set[bytes]:
        return {row.numpy().tobytes() for row in calibration.tokens}

    def ids(calibration: CalibrationSet) -> set[int]:
        return set(calibration.tokens[calibration.mask].tolist())

    def documents(calibration: CalibrationSet) -> set[str]:
        return {segment.document for row in calibration.manifest.rows for segment in row}

    return {
        "equal_rows": float(len(rows(left) & rows(right))),
        "distinct_tokens": _jaccard(ids(left), ids(right)),
        "documents": _jaccard(documents(left), documents(right)),
    }


def _jaccard(left: Set[Hashable], right: Set[Hashable]) -> float:
    return len(left & right) / len(left | right) if left | right else 0.0


def _repetition(row: Sequence[int]) -> float:
    return 1 - len(set(row)) / len(row) if row else 0.0


def _non_letters(text: str) -> float:
    shown = re.sub(r"\s", "", text)
    return sum(not character.isalpha() for character in shown) / len(shown) if shown else 1.0


def _perplexity(loss: float) -> float | None:
    """``exp(loss)``, clamped so that a broken model gives a huge finite number; None without a loss."""
    return math.exp(min(loss, 700.0)) if not math.isnan(loss) else None


def _log(perplexity: float | None) -> float:
    return math.log(perplexity) if perplexity is not None and perplexity > 0 else math.nan


def _coverage_growth(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Distinct ids after each row, int64 ``[rows]``."""
    seen: set[int] = set()
    growth = []
    for row in rows:
        seen.update(row)
        growth.append(len(seen))
    return np.array(growth, dtype=np.int64)
