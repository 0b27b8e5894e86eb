"""Fixed token windows of a text, the same for all models with the same tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from calibrant.calibration.corpus import Corpus
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer

# The text is tokenized at once, which takes some hundred bytes per token.
_MOST_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class EvaluationText:
    """``windows`` int64 ``[n, length]``, and the numbers of tokens in the text and outside the windows."""

    windows: torch.Tensor
    tokens_found: int
    tokens_dropped: int


def evaluation_windows(corpus: Corpus, tokenizer: Tokenizer, length: int, limit: int | None) -> EvaluationText:
    """Join the documents with blank lines, tokenize them once and cut windows of ``length`` tokens without overlap.

    At most ``limit`` windows are used. Where the tokenizer begins texts with BOS, every window begins with BOS and
    contains one text token less.

    Raises:
        CalibrantError: the text is shorter than one window, or longer than 20 million characters.
    """
    ids = tokenizer.encode("\n\n".join(_texts(corpus)))
    prefix = tokenizer.prefix
    body = length - len(prefix)
    count = len(ids) // body
    if count == 0:
        raise CalibrantError(
            f"{corpus.location}: {len(ids)} tokens of text, fewer than one window of {length}; "
            "give more text or a shorter `length`"
        )
    used = min(count, limit) if limit else count
    windows = [prefix + ids[i * body : (i + 1) * body] for i in range(used)]
    return EvaluationText(torch.tensor(windows), len(ids), len(ids) - used * body)


def _texts(corpus: Corpus) -> Iterator[str]:
    characters = 0
    for document in corpus:
        characters += len(document.text)
        if characters > _MOST_CHARACTERS:
            raise CalibrantError(
                f"{corpus.location}: more than {_MOST_CHARACTERS:,} characters of text; give a part of it"
            )
        yield document.text
