"""The beginnings of random documents of a corpus, which stand for all of it."""

import numpy as np

from calibrant.calibration.corpus import Corpus
from calibrant.calibration.document_stream import DocumentStream
from calibrant.calibration.windows import Window
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress
from calibrant.randomness import make_rng

_DOCUMENTS = 100
# Tokens of a document that count: as many as sentence encoders read (ours).
_TOKENS = 512


def sampled_windows(corpus: Corpus, tokenizer: Tokenizer, seed: int, progress: Progress) -> list[Window]:
    """The first 512 tokens of each of 100 random documents, or of all if there are fewer.

    Raises:
        CalibrantError: the corpus cannot be read or has no document that the chat template takes.
    """
    stream = DocumentStream(corpus, [], make_rng(seed, "shard"))
    ordinals = np.array([ordinal for ordinal, _ in stream.kept(progress)])
    chosen = make_rng(seed, "score").permutation(ordinals)[:_DOCUMENTS]
    found = stream.fetch(int(ordinal) for ordinal in chosen)
    documents = stream.tokenized(((int(ordinal), found[int(ordinal)]) for ordinal in chosen), tokenizer)
    windows = [Window(document.tokens[:_TOKENS], [], 0, 0, 0) for document in documents]
    if not windows:
        raise CalibrantError(f"{corpus.location}: no document is left, the chat template refuses {stream.refusals}")
    for note in stream.findings.notes:
        progress.note(note)
    return windows
