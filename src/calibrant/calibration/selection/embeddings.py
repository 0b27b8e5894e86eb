"""Embeddings of texts for selections by distance: lexical ones without a model, or a sentence encoder's."""

import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np

from calibrant.calibration.selection.coverage import SetFamily
from calibrant.calibration.selection.request import LEXICAL
from calibrant.calibration.selection.zipcal import subword_classes
from calibrant.calibration.windows import Window
from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file, sha256_json
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.randomness import make_rng

# A random projection to about log(n) / 0.01 dimensions keeps distances of n points to a tenth (Johnson-Lindenstrauss);
# texts need far fewer. 128 dimensions cost half a kilobyte per candidate.
_WIDTH = 128


class Embedding(Protocol):
    """Reads windows in order, and embeds all of them at the end."""

    def see(self, windows: list[Window]) -> None:
        """Read the next windows."""

    def vectors(self) -> np.ndarray:
        """Unit vectors, float32 ``[windows, width]``; zeros for a window without any sub-word class."""


class LexicalEmbedding:
    """TF-IDF over normalized sub-words, projected to 128 dimensions by a seeded normal matrix (ours).

    ``idf = ln((1 + n) / (1 + df)) + 1``, with ``n`` windows of which ``df`` contain the sub-word.
    """

    def __init__(self, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        self._classes = subword_classes(tokenizer)
        self._universe = int(self._classes.max(initial=-1)) + 1
        self._projection = rng.standard_normal((self._universe, _WIDTH), dtype=np.float32) / np.sqrt(_WIDTH)
        self._bags = SetFamily(self._universe)

    def see(self, windows: list[Window]) -> None:
        """Store the sub-word classes of the windows, with repetition."""
        bags = [self._classes[np.array(window.tokens, dtype=np.int64)] for window in windows]
        bags = [bag[bag >= 0] for bag in bags]
        self._bags.append(np.concatenate(bags), np.array([len(bag) for bag in bags]))

    def vectors(self) -> np.ndarray:
        """TF-IDF, projected and scaled to length 1."""
        bounds, members = self._bags.bounds, self._bags.members
        rows = [np.unique(members[bounds[i] : bounds[i + 1]], return_counts=True) for i in range(len(self._bags))]
        frequency = np.zeros(self._universe)
        for classes, _ in rows:
            frequency[classes] += 1
        weight = (np.log((1 + len(rows)) / (1 + frequency)) + 1).astype(np.float32)
        projected = np.stack(
            [(count * weight[classes]).astype(np.float32) @ self._projection[classes] for classes, count in rows]
        )
        return normalized(projected)


class SentenceEmbedding:
    """A sentence-transformers model, by folder or (with a network) by name."""

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        check_embedding(model)
        from sentence_transformers import SentenceTransformer

        try:
            self._encoder = SentenceTransformer(model)
        except Exception as error:  # many unrelated classes for a folder without such a model
            raise CalibrantError(f"{model}: no sentence encoder can be loaded ({first_line(error)})") from error
        self._tokenizer = tokenizer
        self._parts: list[np.ndarray] = []

    def see(self, windows: list[Window]) -> None:
        """Encode the windows' texts."""
        texts = [self._tokenizer.decode(window.tokens) for window in windows]
        self._parts.append(np.asarray(self._encoder.encode(texts, show_progress_bar=False), dtype=np.float32))

    def vectors(self) -> np.ndarray:
        """The encoder's vectors, scaled to length 1."""
        return normalized(np.concatenate(self._parts))


def check_embedding(name: str) -> None:
    """Check that what an embedding needs is installed.

    Raises:
        CalibrantError: it is a sentence encoder, and its library is not there.
    """
    if name != LEXICAL and importlib.util.find_spec("sentence_transformers") is None:
        raise CalibrantError(
            "sentence encoders need the extra: pip install 'calibrant[embeddings]'; `embedding=\"lexical\"` needs none"
        )


def embedding_of(name: str, tokenizer: Tokenizer, seed: int) -> Embedding:
    """The lexical embedding or the sentence encoder called ``name``."""
    if name == LEXICAL:
        return LexicalEmbedding(tokenizer, make_rng(seed, "embedding"))
    return SentenceEmbedding(name, tokenizer)


def embedding_sha256(name: str) -> str | None:
    """Hash of all files in a sentence encoder's folder; None for the lexical embedding and for encoders by name."""
    folder = Path(name)
    if name == LEXICAL or not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256_json({path.relative_to(folder).as_posix(): sha256_file(path) for path in files})


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; rows of zeros stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: np.ndarray = vectors / np.where(lengths > 0, lengths, 1)
    return result
