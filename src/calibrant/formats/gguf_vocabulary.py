"""A tokenizer as llama.cpp reads it from a GGUF file.

llama.cpp has its own tokenizers and knows ways to cut words by name. Definitions that are known to be the same are
written: SentencePiece's (bytes for what is unknown, spaces as "▁"), and byte-level BPE with one of the cuts below.
"""

import json
from dataclasses import dataclass
from typing import Any

from calibrant.errors import CalibrantError

_SPACE, _FIRST_BYTE = "▁", "<0x00>"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# llama.cpp's names of cuts by expression (``src/llama-vocab.cpp``).
_BY_EXPRESSION = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
# Whether llama.cpp, for a cut of that name, takes a word that is a token as it is.
_IGNORES_MERGES = ("llama-bpe",)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Of a token that no merge makes; scores order merges, the highest first.
_NO_MERGE = -1e6


@dataclass(frozen=True)
class GgufVocabulary:
    """Keys ``tokenizer.ggml.*`` of a GGUF file.

    Attributes:
        model: "llama" for SentencePiece's tokenizers, "gpt2" for byte-level BPE.
        pre: llama.cpp's name for how words are cut; None for SentencePiece's.
        tokens, types: of every id.
        scores: of every id, SentencePiece's alone.
        merges: pairs with a space between, byte-level BPE's alone.
        space_first: whether a text gets a space in front, SentencePiece's alone.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    space_first: bool | None


def gguf_vocabulary(tokenizer: Any, size: int) -> GgufVocabulary:
    """The vocabulary of ``tokenizer``, one of transformers, for a model with ``size`` ids.

    Raises:
        CalibrantError: llama.cpp has no such tokenizer, as far as is known here.
    """
    if not tokenizer.is_fast:
        raise _unknown("it has no tokenizer.json")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise _unknown(f"its model is {model['type']}, not BPE")
    # Without tokens of bytes the setting does nothing; transformers sets it for all that it reads from GGUF files.
    if model.get("byte_fallback") and _FIRST_BYTE in model["vocab"]:
        space_first, pre = _sentence_piece(definition), None
    else:
        space_first, pre = None, _cut(definition)
        if bool(model.get("ignore_merges")) != (pre in _IGNORES_MERGES):
            raise _unknown(f"ignore_merges is {model.get('ignore_merges')}, which is not so in llama.cpp's {pre}")
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(size)]
    if max(texts, default=0) >= size:
        raise CalibrantError(f"the tokenizer has ids beyond the model's {size}, so that llama.cpp would not load it")
    special = {token["id"]: bool(token["special"]) for token in definition["added_tokens"]}
    unknown = model.get("unk_token") if pre is None else None
    types = [
        _type(text, index in texts, special.get(index), text == unknown, pre is None)
        for index, text in enumerate(tokens)
    ]
    if pre is not None:
        return GgufVocabulary("gpt2", pre, tokens, types, None, [f"{left} {right}" for left, right in pairs], None)
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, number)
    scores = [float(-rank[text]) if text in rank else _NO_MERGE for text in tokens]
    return GgufVocabulary("llama", None, tokens, types, scores, None, space_first)


def _type(text: str, known: bool, special: bool | None, unknown: bool, has_bytes: bool) -> int:
    if not known:
        return _UNUSED
    if unknown:
        return _UNKNOWN
    if special is not None:
        return _CONTROL if special else _USER_DEFINED
    return _BYTE if has_bytes and len(text) == 6 and text.startswith("<0x") else _NORMAL


def _sentence_piece(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer of SentencePiece's kind puts a space before a text."""
    normalizer, cut = definition["normalizer"], definition["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    steps = [step for step in steps if step is not None]
    kinds = [step["type"] for step in steps]
    # Gemma cuts at spaces, of which none is left.
    nothing = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if cut in (None, nothing) and kinds in (["Prepend", "Replace"], ["Replace"]):
        replaced = steps[-1]
        if replaced["pattern"] == {"String": " "} and replaced["content"] == _SPACE:
            return len(steps) == 2 and steps[0]["prepend"] == _SPACE
    if not kinds and cut is not None and cut["type"] == "Metaspace" and not cut.get("split", True):
        return bool(cut["prepend_scheme"] != "never")
    raise _unknown("its normalizer is none of SentencePiece's")


def _cut(definition: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts words."""
    normalizer, cut = definition["normalizer"], definition["pre_tokenizer"]
    nothing = normalizer is None or (normalizer["type"] == "Sequence" and not normalizer["normalizers"])
    if not nothing and normalizer["type"] != "NFC":
        raise _unknown(f"its normalizer is {normalizer['type']}")
    steps = [] if cut is None else cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise _unknown("it is not byte-level")
    if steps[-1].get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
    elif kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        found = _BY_EXPRESSION.get(steps[0]["pattern"].get("Regex", ""))
        if found is not None:
            return found
    raise _unknown("words are cut in a way that has no name known here")


def _unknown(reason: str) -> CalibrantError:
    return CalibrantError(f"llama.cpp's name for this model's tokenizer is not known here: {reason}")
