"""The tokenizer as calibration sees it: encode, the special ids, and a hash of what it does."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file, sha256_json

# What a tokenizer with a ``tokenizer.json`` is read from; ``config.json`` may name its class.
_DEFINITION = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def tokenizer_files_sha256(folder: str | Path) -> str | None:
    """Hash of the files that a fast tokenizer in ``folder`` is read from; None if it has no ``tokenizer.json``."""
    files = [Path(folder) / name for name in (_DEFINITION, *_SETTINGS)]
    if not files[0].is_file():
        return None
    return sha256_json({file.name: sha256_file(file) for file in files if file.is_file()})


class Tokenizer:
    """A Hugging Face tokenizer read from a folder, never from the network.

    Raises:
        CalibrantError: the folder is missing or holds no tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder = Path(folder)
        if not folder.is_dir():
            raise CalibrantError(f"{folder}: no such folder, name the folder that holds the model's tokenizer")
        try:
            self.hf: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers library raises plain Exception for damaged files
            raise CalibrantError(f"{folder}: no usable tokenizer ({first_line(error)})") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""
        return list(self.hf(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of every text, on all cores where the tokenizer can."""
        if not self.hf.is_fast:
            return [self.encode(text) for text in texts]
        backend = self._plain_backend
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _plain_backend(self) -> Any:
        """The tokenizer's core without the truncation and padding that its file may ask for."""
        backend = tokenizers.Tokenizer.from_str(self.hf.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    def pieces(self) -> list[str]:
        """The text of every id alone, ``size`` of them; empty for special tokens."""
        special = self.special_ids
        ids = [[index] for index in range(self.size)]
        if self.hf.is_fast:
            texts = self._plain_backend.decode_batch(ids, skip_special_tokens=False)
        else:
            texts = [self.decode(one) for one in ids]
        return ["" if index in special else text for index, text in enumerate(texts)]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self.hf.decode(ids))

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer's own definition (merges, vocabulary, normalization), not of its files."""
        if self.hf.is_fast:
            definition = json.loads(self.hf.backend_tokenizer.to_str())
            # State of the last call, not part of what the tokenizer is.
            definition["truncation"] = definition["padding"] = None
            return sha256_json(definition)
        return sha256_json(self.hf.get_vocab())

    @cached_property
    def files_sha256(self) -> str | None:
        """Hash of the files it is read from, if they alone make it."""
        return tokenizer_files_sha256(self._folder) if self.hf.is_fast else None

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self.hf)

    @property
    def special_ids(self) -> set[int]:
        """Ids that are control tokens rather than text."""
        added = {index for index, token in self.hf.added_tokens_decoder.items() if token.special}
        return added | set(self.hf.all_special_ids)

    @property
    def start_id(self) -> int:
        """The BOS id, or the EOS id for tokenizers without one (ours; methods.md §24).

        Raises:
            CalibrantError: the tokenizer has neither.
        """
        if self.hf.bos_token_id is not None:
            return int(self.hf.bos_token_id)
        if self.hf.eos_token_id is not None:
            return int(self.hf.eos_token_id)
        raise CalibrantError("the tokenizer has neither a BOS nor an EOS token, so a model cannot start a text with it")

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer itself puts before every text: the BOS id, or nothing."""
        bos = self.hf.bos_token_id
        return [int(bos)] if bos is not None and self.hf("a").input_ids[:1] == [bos] else []

    @property
    def separator_id(self) -> int:
        """The id put after each document when documents are packed: EOS, or BOS where there is none."""
        return int(self.hf.eos_token_id) if self.hf.eos_token_id is not None else self.start_id
