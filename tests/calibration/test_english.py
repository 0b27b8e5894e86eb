"""English first tokens: whole words only, whatever the tokenizer makes of words and of the spaces before them."""

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

import calibrant as cb
from calibrant.calibration.sources.english import english_beginnings
from calibrant.modeling.tokenizer import Tokenizer


def merged(*words: str) -> models.BPE:
    """A model that joins the letters of ``words`` from left to right and nothing else."""
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    vocabulary = dict.fromkeys(["<unk>", "<s>", *letters, *(left + right for left, right in merges)])
    return models.BPE({token: index for index, token in enumerate(vocabulary)}, list(merges), unk_token="<unk>")


def sentencepiece() -> Backend:
    """A space before the first word; " he" is written "▁", "▁he", and "▁of" is none of its tokens."""
    backend = Backend(merged("▁the", "▁he", "▁no", "of"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.normalizer = normalizers.Prepend("▁")
    backend.decoder = decoders.Metaspace()
    return backend


def byte_level() -> Backend:
    backend = Backend(merged("Ġthe", "the", "The", "Ġof", "Whe", "nob"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def lower_case() -> Backend:
    words = ["<unk>", "<s>", "the", "where", "##as", "in", "##to", "x"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return backend


def saved(backend: Backend, folder: Path) -> Tokenizer:
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        (sentencepiece(), {"▁the", "▁he", "▁no"}),
        (byte_level(), {"Ġthe", "the", "The", "Ġof", "no", "a", "i"}),
        (lower_case(), {"the", "where", "in"}),
    ],
)
def test_only_whole_words_begin_a_text(backend: Backend, expected: set[str], tmp_path: Path) -> None:
    tokenizer = saved(backend, tmp_path)
    assert {tokenizer.hf.convert_ids_to_tokens(index) for index in english_beginnings(tokenizer)} == expected


def test_a_real_vocabulary_keeps_its_words_and_loses_its_fragments(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    beginnings = set(english_beginnings(tokenizer))
    assert beginnings > {tokenizer.encode(word)[0] for word in ("The", " the", "What", "therefore")}
    assert beginnings.isdisjoint(tokenizer.encode(word)[0] for word in ("nobody", "myself", "toward", " Onto"))
    words = {tokenizer.decode([index]).strip() for index in beginnings}
    assert all(word.isalpha() and word in (word.lower(), word.capitalize()) for word in words)


def test_a_vocabulary_without_a_word_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "▁": 2}, unk_token="<unk>"))
    with pytest.raises(cb.CalibrantError, match=r"no token .* whole English function word"):
        english_beginnings(saved(backend, tmp_path))
