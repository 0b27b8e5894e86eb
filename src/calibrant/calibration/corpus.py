"""Corpora: documents with stable ids, read from files, folders, the hub or Python's own documentation."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file, sha256_json

BUILTIN = "builtin"
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".raw", ".utf8"}
_SUFFIXES = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
# Text files are read in pieces and rows are dropped beyond this many characters, so that no text fills the memory.
LONGEST_TEXT = 4_000_000
_BLOCK_BYTES = 1 << 20


Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One text with an id that stays the same as long as the corpus does.

    A conversation has its ``messages`` too (role and content); ``text`` is then what they say, a line each.
    """

    id: str
    text: str
    messages: tuple[Message, ...] | None = None


class Corpus:
    """Documents of one origin.

    ``location`` is a file (``.txt``, ``.jsonl``, ``.parquet``, each also as ``.gz``), a folder of such files,
    ``builtin`` (the Python language reference that ships with the interpreter), or a data set on the Hugging
    Face hub as ``hub:owner/name?config=en&split=train``. A text file is one document, or one for each ``LONGEST_TEXT``
    characters, cut at a line's end; in JSON Lines and Parquet a row is one, its text under ``field``. That
    may also be a conversation: a list of messages with ``role`` and ``content``. Rows without text and rows longer than
    ``LONGEST_TEXT`` characters are skipped and counted.

    Raises:
        CalibrantError: the location does not exist or holds nothing readable.
    """

    def __init__(self, location: str | Path, field: str = "text") -> None:
        self.location, self.field = str(location), field
        self._reset()
        if self.location == BUILTIN:
            self._files: list[Path] = []
        elif self.location.startswith("hub:"):
            self._files = []
            self._hub = _HubDataset(self.location)
        else:
            self._files = _corpus_files(Path(self.location))

    def _reset(self) -> None:
        self.counts = {"documents_empty": 0, "documents_too_long": 0}
        self.position = 0

    @property
    def size(self) -> int | None:
        """Bytes on disk, None where there are no files; ``position`` says how many of them an iteration has read."""
        return None if not self._files else sum(path.stat().st_size for path in self._files)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents with text in a fixed order; the others are counted in ``counts``."""
        self._reset()
        for document in self._read():
            if len(document.text) > LONGEST_TEXT:
                self.counts["documents_too_long"] += 1
            elif not document.text or document.text.isspace():
                self.counts["documents_empty"] += 1
            else:
                yield document

    def _read(self) -> Iterator[Document]:
        if self.location == BUILTIN:
            yield from _builtin_documents()
        elif self.location.startswith("hub:"):
            yield from self._hub.documents(self.field)
        else:
            root = Path(self.location)
            for path in self._files:
                name = path.name if root.is_file() else path.relative_to(root).as_posix()
                yield from self._read_file(path, name)

    def _read_file(self, path: Path, name: str) -> Iterator[Document]:
        before = self.position
        try:
            with path.open("rb") as raw:
                for document in _file_documents(path, raw, name, self.field):
                    self.position = before + raw.tell()
                    yield document
        except (OSError, EOFError, zlib.error) as error:
            raise CalibrantError(f"{path}: cannot be read ({error}); is it complete?") from error

    def describe(self) -> dict[str, Any]:
        """The corpus's identity for a manifest: names and content hashes, no absolute paths."""
        if self.location == BUILTIN:
            texts = sha256_json({document.id: document.text for document in _builtin_documents()})
            return {"kind": "builtin", "name": "python-language-reference", "sha256": texts}
        if self.location.startswith("hub:"):
            return self._hub.describe(self.field)
        root = Path(self.location)
        files = {p.name if root.is_file() else p.relative_to(root).as_posix(): sha256_file(p) for p in self._files}
        return {"kind": "files", "name": root.name, "field": self.field, "files": files}


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _corpus_files(root: Path) -> list[Path]:
    if root.is_file():
        if _suffix(root) not in _SUFFIXES:
            raise CalibrantError(
                f"{root}: unknown kind of corpus file, expected .txt, .jsonl or .parquet (or .gz of these)"
            )
        return [root]
    if not root.is_dir():
        raise CalibrantError(f"{root}: no such corpus file or folder (a hub data set is written hub:owner/name)")
    files = sorted(p for p in root.rglob("*") if p.is_file() and _suffix(p) in _SUFFIXES)
    if not files:
        raise CalibrantError(f"{root}: the folder holds no .txt, .jsonl or .parquet file (or .gz of these)")
    return files


def _builtin_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"python/{name}", topics[name])


def _file_documents(path: Path, raw: BinaryIO, name: str, field: str) -> Iterator[Document]:
    packed = path.suffix.lower() == ".gz"
    if _suffix(path) == ".parquet":
        yield from _parquet_rows(path, io.BytesIO(gzip.decompress(raw.read())) if packed else raw, name, field)
        return
    stream: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK_BYTES) if packed else raw
    if _suffix(path) == ".jsonl":
        yield from _json_lines(path, stream, name, field)
    else:
        yield from _text_pieces(path, stream, name)


def _text_pieces(path: Path, stream: BinaryIO, name: str) -> Iterator[Document]:
    """The file as one document; a longer one as several, each but the last ending with a line."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number, rest, done = 0, "", False
    while not done:
        block = stream.read(_BLOCK_BYTES)
        done = not block
        try:
            rest += decoder.decode(block, final=done)
        except UnicodeDecodeError as error:
            raise CalibrantError(f"{path}: not UTF-8 text ({error.reason}); convert the file first") from error
        while len(rest) > LONGEST_TEXT or (done and rest):
            number += 1
            end = len(rest) if len(rest) <= LONGEST_TEXT else rest.rfind("\n", 0, LONGEST_TEXT) + 1 or LONGEST_TEXT
            yield Document(name if done and number == 1 and end == len(rest) else f"{name}#{number}", rest[:end])
            rest = rest[end:]


def _json_lines(path: Path, stream: BinaryIO, name: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CalibrantError(f"{path}, line {number}: not UTF-8 text; convert the file first") from error
        if not text.isspace():
            yield _json_document(f"{name}:{number}", text, field, f"{path}, line {number}")


def _json_document(name: str, line: str, field: str, place: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrantError(f"{place}: not JSON ({error})") from error
    document = _as_document(name, row.get(field) if isinstance(row, dict) else None)
    if document is None:
        if isinstance(row, dict) and field in row:
            raise CalibrantError(f"{place}: what is under {field!r} is neither a text nor a conversation")
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CalibrantError(f"{place}: no text under {field!r} (found: {found}); name it with --field")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise CalibrantError(f"{place}: text with half of a surrogate pair, which is not Unicode") from error
    return document


def _as_document(name: str, value: Any) -> Document | None:
    """A text or a conversation as a document; None where ``value`` is neither."""
    if isinstance(value, str):
        return Document(name, value)
    if not isinstance(value, list) or not _is_conversation(value):
        return None
    messages = tuple({"role": one["role"], "content": one["content"]} for one in value)
    return Document(name, "\n".join(message["content"] for message in messages), messages)


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in value
    )


def _parquet_rows(path: Path, source: Any, name: str, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(source)
        columns = table.schema_arrow.names
        if field not in columns:
            raise CalibrantError(f"{path}: no column {field!r} (found: {', '.join(columns)}); name it with --field")
        row = 0
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                document = _as_document(f"{name}:{row}", "" if value is None else value)
                if document is None:
                    raise CalibrantError(
                        f"{path}, row {row}: column {field!r} holds no text; name another with --field"
                    )
                yield document
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrantError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


class _HubDataset:
    """A data set on the hub, its revision resolved before anything is loaded and passed into the load."""

    def __init__(self, location: str) -> None:
        parts = urlsplit(location.removeprefix("hub:"))
        options = dict(parse_qsl(parts.query))
        unknown = set(options) - {"config", "split", "revision"}
        if parts.path.count("/") != 1 or unknown:
            raise CalibrantError(f"{location}: expected hub:owner/name with ?config=, split= or revision= only")
        self.name, self.config = parts.path, options.get("config")
        self.split = options.get("split", "train")
        self.revision = self._resolve(options.get("revision"))

    def _resolve(self, revision: str | None) -> str:
        import huggingface_hub

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.name, revision=revision).sha)
        except Exception as error:  # the hub client raises many unrelated classes for "not reachable" and "not there"
            raise CalibrantError(f"hub:{self.name}: cannot be resolved on the hub ({first_line(error)})") from error

    def documents(self, field: str) -> Iterator[Document]:
        try:
            import datasets

            rows = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except ImportError as error:
            raise CalibrantError("hub data sets need the extra: pip install 'calibrant[hub]'") from error
        except Exception as error:  # many unrelated classes for a wrong name of a configuration or split
            raise CalibrantError(f"hub:{self.name}: cannot be opened ({first_line(error)})") from error
        for number, row in enumerate(rows, start=1):
            document = _as_document(f"{self.name}/{self.split}:{number}", row.get(field))
            if document is None:
                raise CalibrantError(
                    f"hub:{self.name}, row {number}: no text under {field!r} (found: {', '.join(row)})"
                )
            yield document

    def describe(self, field: str) -> dict[str, Any]:
        return {
            "kind": "hub",
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "field": field,
        }
