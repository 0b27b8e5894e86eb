"""Tokenizers for calibration: encoding, special ids and a hash of the definition."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file, sha256_json

# Files of a tokenizer with a ``tokenizer.json``; ``config.json`` can name its class.
_DEFINITION = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def tokenizer_files_sha256(folder: str | Path) -> str | None:
    """SHA-256 over the files of a fast tokenizer in ``folder``; None without a ``tokenizer.json``."""
    files = [Path(folder) / name for name in (_DEFINITION, *_SETTINGS)]
    if not files[0].is_file():
        return None
    return sha256_json({file.name: sha256_file(file) for file in files if file.is_file()})


class Tokenizer:
    """A Hugging Face tokenizer read from a folder, never from the network.

    Raises:
        CalibrantError: the folder is missing or contains no usable tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder = Path(folder)
        if not folder.is_dir():
            raise CalibrantError(f"{folder}: no such folder, name the folder that contains the model's tokenizer")
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
        """``encode`` every text, on all cores if the tokenizer is a fast one."""
        if not self.hf.is_fast:
            return [self.encode(text) for text in texts]
        backend = self._plain_backend
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _plain_backend(self) -> Any:
        """The fast tokenizer without the truncation and padding that its file can define."""
        backend = tokenizers.Tokenizer.from_str(self.hf.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    def pieces(self) -> list[str]:
        """Text of each id decoded alone, ``size`` strings; empty for special tokens."""
        special = self.special_ids
        ids = [[index] for index in range(self.size)]
        if self.hf.is_fast:
            texts = self._plain_backend.decode_batch(ids, skip_special_tokens=False)
        else:
            texts = [self.decode(single) for single in ids]
        return ["" if index in special else text for index, text in enumerate(texts)]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens included."""
        return str(self.hf.decode(ids))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the definition (merges, vocabulary, normalization), whatever the format of the files."""
        if self.hf.is_fast:
            definition = json.loads(self.hf.backend_tokenizer.to_str())
            # Truncation and padding are state of the last call, not part of the definition.
            definition["truncation"] = definition["padding"] = None
            return sha256_json(definition)
        return sha256_json(self.hf.get_vocab())

    @cached_property
    def files_sha256(self) -> str | None:
        """SHA-256 of the tokenizer's files if they define it completely (fast tokenizers), else None."""
        return tokenizer_files_sha256(self._folder) if self.hf.is_fast else None

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.hf)

    @property
    def special_ids(self) -> set[int]:
        """Ids of control tokens."""
        added = {index for index, token in self.hf.added_tokens_decoder.items() if token.special}
        return added | set(self.hf.all_special_ids)

    @property
    def start_id(self) -> int:
        """The BOS id, or the EOS id for tokenizers without BOS (ours).

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
        """Ids that the tokenizer puts before every text: the BOS id, or none."""
        bos = self.hf.bos_token_id
        return [int(bos)] if bos is not None and self.hf("a").input_ids[:1] == [bos] else []

    @property
    def separator_id(self) -> int:
        """The id after each packed document: EOS, or BOS for tokenizers without EOS."""
        return int(self.hf.eos_token_id) if self.hf.eos_token_id is not None else self.start_id
