"""Fixed token windows of a text, the same for all models with the same tokenizer."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from calibrant.calibration.corpus import Corpus
from calibrant.calibration.packed import unpacked
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer

# The text is tokenized at once, which takes some hundred bytes per token.
_MOST_CHARACTERS = 20_000_000
PAPERS_LENGTH = 2048


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


def wikitext_windows(path: str | Path, tokenizer: Tokenizer, context: int | None, limit: int | None) -> EvaluationText:
    """Windows of WikiText's raw file ``path`` (or ``.gz``) as the scripts of GPTQ and later papers cut them.

    Rows are the file's lines with their line ends, blank ones empty; they are joined by two line ends, tokenized once
    with what the tokenizer puts before and after a text, and cut into windows of 2,048 tokens (the model's ``context``
    if that is shorter) without overlap: no window but the first begins with BOS. At most ``limit`` windows are used.
    Source: github.com/IST-DASLab/gptq, datautils.py and llama.py (GPTQ, arXiv 2210.17323).

    Raises:
        CalibrantError: the file is missing, JSON Lines, no UTF-8 text, or shorter than one window.
    """
    rows = (f"{line}\n" if line.strip() else "" for line in _raw_text(Path(path)).removesuffix("\n").split("\n"))
    ids = list(tokenizer.hf("\n\n".join(rows), verbose=False)["input_ids"])
    length = min(PAPERS_LENGTH, context or PAPERS_LENGTH)
    count = len(ids) // length
    if count == 0:
        raise CalibrantError(f"{path}: {len(ids)} tokens of text, fewer than one window of {length}")
    used = min(count, limit) if limit else count
    return EvaluationText(torch.tensor(ids[: used * length]).view(used, length), len(ids), len(ids) - used * length)


def _raw_text(path: Path) -> str:
    try:
        with path.open("rb") as raw:
            found = (unpacked(path, raw) if path.suffix == ".gz" else raw).read(_MOST_CHARACTERS + 1)
        text = found.decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CalibrantError(f"{path}: no readable text file ({error}); `wikitext` is WikiText's raw file") from error
    if text.lstrip().startswith('{"'):
        raise CalibrantError(f"{path}: JSON Lines, where `wikitext` is WikiText's raw file; give it as a corpus")
    if len(found) > _MOST_CHARACTERS:
        raise CalibrantError(f"{path}: more than {_MOST_CHARACTERS:,} bytes of text; give the test split")
    return text


def _texts(corpus: Corpus) -> Iterator[str]:
    characters = 0
    for document in corpus:
        characters += len(document.text)
        if characters > _MOST_CHARACTERS:
            raise CalibrantError(
                f"{corpus.location}: more than {_MOST_CHARACTERS:,} characters of text; give a part of it"
            )
        yield document.text
