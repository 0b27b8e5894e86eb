"""Where a corpus's documents come from: files, the hub, Python's own documentation, or memory."""

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qsl, urlsplit

from calibrant.calibration.document import Document, as_document, check_unicode
from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file, sha256_json

HUB = "hub:"
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".raw", ".utf8"}
_SUFFIXES = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
_BLOCK_BYTES = 1 << 20


class CorpusSource(Protocol):
    """Documents in a fixed order, as often as they are asked for."""

    @property
    def size(self) -> int | None:
        """Bytes on disk, None if there are no files."""

    @property
    def position(self) -> int:
        """Bytes of ``size`` that the current pass has read."""

    def documents(self) -> Iterator[Document]:
        """One pass over all documents, those without text included."""

    def describe(self) -> dict[str, Any]:
        """Names and content hashes for a manifest."""


class BuiltinSource:
    """The Python language reference that ships with the interpreter."""

    size: int | None = None
    position = 0

    def documents(self) -> Iterator[Document]:
        """See ``CorpusSource``."""
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield Document(f"python/{name}", topics[name])

    def describe(self) -> dict[str, Any]:
        """See ``CorpusSource``."""
        texts = sha256_json({document.id: document.text for document in self.documents()})
        return {"kind": "builtin", "name": "python-language-reference", "sha256": texts}


class MemorySource:
    """Texts, conversations, documents or rows that the caller has.

    Lists and iterators are read at once. Any other iterable, such as a ``datasets.Dataset``, is read in every pass.
    """

    size: int | None = None
    position = 0

    def __init__(self, given: Iterable[Any], field: str) -> None:
        if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
            hint = "; choose one of its splits" if isinstance(given, Mapping) else ""
            raise CalibrantError(f"a corpus is a location or a list of texts, got {type(given).__name__}{hint}")
        self._field, self._given = field, given
        if isinstance(given, list | tuple | Iterator):
            found = [self._document(number, one) for number, one in enumerate(given)]
            if not found:
                raise CalibrantError("the corpus is empty: it has no document")
            if len({document.id for document in found}) < len(found):
                raise CalibrantError("the corpus's documents need different ids: give each its own")
            self._given = found

    def documents(self) -> Iterator[Document]:
        """See ``CorpusSource``."""
        for number, one in enumerate(self._given):
            yield self._document(number, one)

    def _document(self, number: int, given: Any) -> Document:
        place = f"document {number} in memory"
        if isinstance(given, Mapping):
            if self._field not in given:
                raise CalibrantError(
                    f"{place}: no text under {self._field!r} (found: {', '.join(map(str, given))}); "
                    "name it with `field`"
                )
            given = "" if given[self._field] is None else given[self._field]
        document = given if isinstance(given, Document) else as_document(str(number), given)
        if document is None:
            raise CalibrantError(f"{place}: neither a text nor a conversation, got {type(given).__name__}")
        check_unicode(document, place)
        return document

    def describe(self) -> dict[str, Any]:
        """See ``CorpusSource``; the hash covers ids and texts, of conversations the messages."""
        digest, count = hashlib.sha256(), 0
        for document in self.documents():
            count += 1
            digest.update(sha256_json([document.id, document.messages or document.text]).encode())
        return {"kind": "memory", "name": "memory", "sha256": digest.hexdigest(), "documents": count}


class FileSource:
    """A file, or every readable file in a folder, in the order of their paths.

    Raises:
        CalibrantError: there is no such file or folder, or it contains nothing readable.
    """

    def __init__(self, root: Path, field: str, longest: int) -> None:
        self._root, self._field, self._longest = root, field, longest
        self._paths = _readable_files(root)
        self.position = 0

    @property
    def size(self) -> int | None:
        """See ``CorpusSource``."""
        return sum(path.stat().st_size for path in self._paths)

    def documents(self) -> Iterator[Document]:
        """See ``CorpusSource``."""
        self.position = 0
        for path in self._paths:
            before = self.position
            try:
                with path.open("rb") as raw:
                    for document in _file_documents(path, raw, self._name(path), self._field, self._longest):
                        self.position = before + raw.tell()
                        yield document
            except (OSError, EOFError, zlib.error) as error:
                raise CalibrantError(f"{path}: cannot be read ({error}); is it complete?") from error

    def describe(self) -> dict[str, Any]:
        """See ``CorpusSource``."""
        files = {self._name(path): sha256_file(path) for path in self._paths}
        return {"kind": "files", "name": self._root.name, "field": self._field, "files": files}

    def _name(self, path: Path) -> str:
        return path.name if self._root.is_file() else path.relative_to(self._root).as_posix()


class HubSource:
    """A data set on the hub, read at the revision that it had when the corpus was opened."""

    size: int | None = None
    position = 0

    def __init__(self, location: str, field: str) -> None:
        parts = urlsplit(location.removeprefix(HUB))
        options = dict(parse_qsl(parts.query))
        unknown = set(options) - {"config", "split", "revision"}
        if parts.path.count("/") != 1 or unknown:
            raise CalibrantError(f"{location}: expected hub:owner/name with ?config=, split= or revision= only")
        self.name, self.config = parts.path, options.get("config")
        self.split = options.get("split", "train")
        self.revision = self._resolve(options.get("revision"))
        self._field = field

    def _resolve(self, revision: str | None) -> str:
        import huggingface_hub

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.name, revision=revision).sha)
        except Exception as error:  # the hub client raises many unrelated classes for "not reachable" and "not there"
            raise CalibrantError(f"hub:{self.name}: cannot be resolved on the hub ({first_line(error)})") from error

    def documents(self) -> Iterator[Document]:
        """See ``CorpusSource``."""
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
            document = as_document(f"{self.name}/{self.split}:{number}", row.get(self._field))
            if document is None:
                raise CalibrantError(
                    f"hub:{self.name}, row {number}: no text under {self._field!r} (found: {', '.join(row)})"
                )
            yield document

    def describe(self) -> dict[str, Any]:
        """See ``CorpusSource``."""
        return {
            "kind": "hub",
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "field": self._field,
        }


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _readable_files(root: Path) -> list[Path]:
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
        raise CalibrantError(f"{root}: the folder contains no .txt, .jsonl or .parquet file (or .gz of these)")
    return files


def _file_documents(path: Path, raw: BinaryIO, name: str, field: str, longest: int) -> Iterator[Document]:
    packed = path.suffix.lower() == ".gz"
    if _suffix(path) == ".parquet":
        yield from _parquet_rows(path, io.BytesIO(gzip.decompress(raw.read())) if packed else raw, name, field)
        return
    stream: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK_BYTES) if packed else raw
    if _suffix(path) == ".jsonl":
        yield from _json_lines(path, stream, name, field)
    else:
        yield from _text_pieces(path, stream, name, longest)


def _text_pieces(path: Path, stream: BinaryIO, name: str, longest: int) -> Iterator[Document]:
    """The file as documents of at most ``longest`` characters, cut at line ends where possible."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number, rest, done = 0, "", False
    while not done:
        block = stream.read(_BLOCK_BYTES)
        done = not block
        try:
            rest += decoder.decode(block, final=done)
        except UnicodeDecodeError as error:
            raise CalibrantError(f"{path}: not UTF-8 text ({error.reason}); convert the file first") from error
        while len(rest) > longest or (done and rest):
            number += 1
            end = len(rest) if len(rest) <= longest else rest.rfind("\n", 0, longest) + 1 or longest
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
    document = as_document(name, row.get(field) if isinstance(row, dict) else None)
    if document is None:
        if isinstance(row, dict) and field in row:
            raise CalibrantError(f"{place}: {field!r} is neither a text nor a conversation")
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CalibrantError(f"{place}: no text under {field!r} (found: {found}); name it with `field`")
    check_unicode(document, place)
    return document


def _parquet_rows(path: Path, source: Any, name: str, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(source)
        columns = table.schema_arrow.names
        if field not in columns:
            raise CalibrantError(f"{path}: no column {field!r} (found: {', '.join(columns)}); name it with `field`")
        row = 0
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                document = as_document(f"{name}:{row}", "" if value is None else value)
                if document is None:
                    raise CalibrantError(
                        f"{path}, row {row}: column {field!r} contains no text; name another with `field`"
                    )
                yield document
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrantError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
