"""Tokenizers for calibration: encoding, special ids and a hash of the definition."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_bytes, sha256_file, sha256_json
from calibrant.modeling.chat_template import ChatTemplate
from calibrant.modeling.quietly import quietly

# Files of a tokenizer with a ``tokenizer.json``; ``config.json`` can name its class.
_DEFINITION = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
# Files that define a tokenizer, or a vocabulary.
_VOCABULARY = re.compile(r"tokenizer|tekken|vocab|merges|\.(model|spm|tiktoken|bpe)$", re.IGNORECASE)
# A vocabulary of tiktoken has a token in Base64 and its rank on every line; one of SentencePiece is a protocol buffer.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def tokenizer_files_sha256(folder: str | Path) -> str | None:
    """SHA-256 over the files of a fast tokenizer in ``folder``; None without a ``tokenizer.json``."""
    files = [Path(folder) / name for name in (_DEFINITION, *_SETTINGS)]
    if not files[0].is_file():
        return None
    return sha256_json({file.name: sha256_file(file) for file in files if file.is_file()})


def has_tokenizer(folder: str | Path) -> bool:
    """Whether ``folder`` has a file besides the model's configuration and weights that may define a tokenizer."""
    names = {path.name for path in Path(folder).iterdir() if path.is_file()}
    return any(_VOCABULARY.search(name) for name in names)


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
            with quietly():
                self.hf: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
                self._try_out()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the tokenizers library raises plain Exception for damaged files, and panics
            missing = _missing_libraries(folder)
            reason = f"its vocabulary needs: pip install {missing}" if missing else first_line(error)
            raise CalibrantError(f"{folder}: no usable tokenizer ({reason})") from error

    def _try_out(self) -> None:
        """Settings of a wrong type load well and fail at the first use."""
        for special in (True, False):
            self.hf("a", add_special_tokens=special, verbose=False)
        self.hf.decode([0])
        _ = self.hf.bos_token_id, self.hf.eos_token_id
        if self.size <= len(self.special_ids):
            raise ValueError("it has special tokens alone: transformers reads no vocabulary from the folder")
        if not isinstance(self.hf.model_max_length, int | float):
            raise ValueError(f"model_max_length is {self.hf.model_max_length!r}, not a number")
        if not isinstance(self.hf.chat_template, str | dict | None):
            raise ValueError("its chat template is not a text")

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens.

        Raises:
            CalibrantError: the tokenizer fails on the text.
        """
        with self._encoding():
            return list(self.hf(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``encode`` every text, on all cores if the tokenizer is a fast one.

        Raises:
            CalibrantError: the tokenizer fails on a text.
        """
        if not self.hf.is_fast:
            return [self.encode(text) for text in texts]
        backend = self._plain_backend
        with self._encoding():
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises its base class for vocabularies without a token for the unknown
            raise CalibrantError(
                f"{self._folder}: its tokenizer cannot encode a text ({first_line(error)}); copy or download it again"
            ) from error

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
    def identity(self) -> dict[str, str | None]:
        """Hashes of the definition, of the files and of the chat template, for what depends on all of them."""
        template = sha256_bytes(json.dumps(self.hf.chat_template).encode())
        return {"sha256": self.sha256, "files_sha256": self.files_sha256, "chat_template_sha256": template}

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.hf)

    @property
    def special_ids(self) -> set[int]:
        """Ids of control tokens."""
        added = {index for index, token in self.hf.added_tokens_decoder.items() if token.special}
        return added | set(self.hf.all_special_ids)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The template of conversations; that there is none is said when it is used."""
        return ChatTemplate(self.hf)

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
        """The id after each packed document: EOS, or BOS for tokenizers without EOS.

        Raises:
            CalibrantError: the tokenizer has neither.
        """
        for found in (self.hf.eos_token_id, self.hf.bos_token_id):
            if found is not None:
                return int(found)
        raise CalibrantError(
            "the tokenizer has neither an EOS nor a BOS token to put between documents; "
            'use `windows="window"` or `windows="document"`'
        )

    @property
    def padding_id(self) -> int:
        """The id that fills rows after their last token and never counts: EOS, BOS, the pad token, or 0."""
        known = (self.hf.eos_token_id, self.hf.bos_token_id, self.hf.pad_token_id)
        return next((int(index) for index in known if index is not None), 0)


def _missing_libraries(folder: Path) -> str:
    """The libraries to install for the vocabulary in ``folder``; "" if none is missing.

    transformers names the last library that it tried, which may be one that does not help.
    """
    if (folder / _DEFINITION).is_file():
        return ""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if (folder / "tekken.json").is_file():
        wanted = {"mistral-common": "mistral_common"}
    elif any(_is_tiktoken(path) for path in files if path.suffix in (".model", ".tiktoken")):
        wanted = {"tiktoken": "tiktoken"}
    elif any(path.suffix in (".model", ".spm") for path in files):
        wanted = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    else:
        return ""
    if all(_is_installed(module) for module in wanted.values()):
        return ""
    return "'calibrant[sentencepiece]'" if "sentencepiece" in wanted else " ".join(wanted)


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.match(file.readline(1000)) is not None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
