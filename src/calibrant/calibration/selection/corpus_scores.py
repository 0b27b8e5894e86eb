"""COLA, stage 1: how well corpora fit the texts that a model will be used on (arXiv 2510.10618)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrant.calibration.corpus import Corpus
from calibrant.calibration.selection.embeddings import embedding_of
from calibrant.calibration.selection.request import LEXICAL
from calibrant.calibration.selection.sampled import sampled_windows
from calibrant.calibration.windows import Window
from calibrant.errors import CalibrantError
from calibrant.modeling.hub import model_path
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import NoProgress, Progress

SIMILARITY_SHARE = 0.6
_SMOOTHING = 1e-10


@dataclass(frozen=True)
class CorpusScore:
    """A corpus compared with targets; all numbers are weighted means over the targets.

    Attributes:
        corpus: location of the corpus.
        similarity: mean cosine similarity of the corpus's texts with a target's.
        divergence: symmetric Kullback-Leibler divergence of the token distributions, in nats.
        score: both combined; larger is better.
    """

    corpus: str
    similarity: float
    divergence: float
    score: float


def score_corpora(
    corpora: Sequence[Corpus | str | Path],
    targets: Sequence[Corpus | str | Path],
    *,
    tokenizer: str | Path,
    weights: Sequence[float] | None = None,
    embedding: str = LEXICAL,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[CorpusScore]:
    """Score ``corpora`` against ``targets``; the best comes first.

    The score is ``0.6 similarity + 0.4 (1 - min(divergence / ln T, 1))`` on 100 random documents of each corpus, or all
    if there are fewer; ``T`` is the number of different tokens in either corpus (arXiv 2510.10618, stage 1). With the
    released code's smoothing of 1e-10, the divergence of unlike corpora is often above ``ln T``; then similarity alone
    decides.

    Args:
        corpora: corpora or their locations (see ``Corpus``).
        targets: texts that the model will be used on, as corpora or locations.
        tokenizer: a model folder.
        weights: weights of the targets, equal by default.
        embedding: "lexical", or a sentence-transformers model (the paper: MiniLM).
        seed: seed of the choice of documents.
        progress: receives the progress.

    Raises:
        CalibrantError: a corpus cannot be read or is empty, or the weights do not fit.
    """
    wanted, against = [_corpus(one) for one in corpora], [_corpus(one) for one in targets]
    if not wanted or not against:
        raise CalibrantError("scores need at least one corpus and one target")
    shares = np.asarray(weights if weights is not None else [1.0] * len(against), dtype=np.float64)
    if len(shares) != len(against) or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() == 0:
        raise CalibrantError(
            f"weights {shares.tolist()}: give one for each of the {len(against)} targets, none negative"
        )
    return _scores(wanted, against, shares / shares.sum(), Tokenizer(model_path(tokenizer)), embedding, seed, progress)


def _corpus(given: Corpus | str | Path) -> Corpus:
    return given if isinstance(given, Corpus) else Corpus(given)


def _scores(
    corpora: list[Corpus],
    targets: list[Corpus],
    shares: np.ndarray,
    tokenizer: Tokenizer,
    embedding: str,
    seed: int,
    progress: Progress | None,
) -> list[CorpusScore]:
    embedded = embedding_of(embedding, tokenizer, seed)
    samples = [sampled_windows(corpus, tokenizer, seed, progress or NoProgress()) for corpus in (*corpora, *targets)]
    for sample in samples:
        embedded.see(sample)
    bounds = np.cumsum([len(sample) for sample in samples])[:-1]
    vectors = np.split(embedded.vectors(), bounds)
    counts = [_token_counts(sample, tokenizer.size) for sample in samples]
    scores = []
    for index, corpus in enumerate(corpora):
        similarity = [float((vectors[index] @ vectors[other].T).mean()) for other in range(len(corpora), len(samples))]
        divergence = [_divergence(counts[index], counts[other]) for other in range(len(corpora), len(samples))]
        fit = [
            SIMILARITY_SHARE * alike + (1 - SIMILARITY_SHARE) * (1 - min(nats / math.log(max(types, 2)), 1))
            for alike, (nats, types) in zip(similarity, divergence, strict=True)
        ]
        means = [float(shares @ values) for values in (similarity, [nats for nats, _ in divergence], fit)]
        scores.append(CorpusScore(corpus.location, *means))
    return sorted(scores, key=lambda one: -one.score)


def _token_counts(sample: list[Window], size: int) -> np.ndarray:
    tokens = [token for window in sample for token in window.tokens]
    return np.bincount(np.array(tokens, dtype=np.int64), minlength=size)


def _divergence(left: np.ndarray, right: np.ndarray) -> tuple[float, int]:
    """Symmetric divergence of two token distributions in nats, and the number of tokens in either."""
    union = (left > 0) | (right > 0)
    p, q = (counts[union] / counts.sum() + _SMOOTHING for counts in (left, right))
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * (np.log(p) - np.log(q))).sum() / 2), int(union.sum())
