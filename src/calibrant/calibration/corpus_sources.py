"""Where a corpus's documents come from: files, the hub, Python's own documentation, or memory."""

import codecs
import hashlib
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qsl, urlsplit

from calibrant.calibration.document import TOOLS, Document, Unusable, row_document, value_document
from calibrant.calibration.packed import largest_unpacked, too_large, unpacked
from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file, sha256_json

HUB = "hub:"
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".raw", ".utf8"}
_SUFFIXES = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
_BLOCK_BYTES = 1 << 20
# A text of the greatest length with every character escaped takes 24 MB of JSON.
_LONGEST_LINE_BYTES = 32 << 20
# Few, because a value may be large.
_ROWS_AT_ONCE = 1024
# What data sets keep beside their data, as text files.
_CARD = re.compile(
    r"([\d_. -]*readme|(un)?licen[cs]es?|copying|notices?|citation|changelog|contributing|authors|security"
    r"|code_of_conduct|dataset_card)([^a-z].*)?"
    r"|requirements([^a-z].*)?\.txt|(.*[^a-z])?(check|ck|md5|b2|sha\d*)?sums\.txt"
)
Row = Document | Unusable


class CorpusSource(Protocol):
    """Documents in a fixed order, as often as they are asked for."""

    @property
    def size(self) -> int | None:
        """Bytes on disk, None if there are no files."""

    @property
    def position(self) -> int:
        """Bytes of ``size`` that the current pass has read."""

    @property
    def left_out(self) -> Sequence[str]:
        """Names of files of a folder that are text, but no data."""

    def rows(self) -> Iterator[Row]:
        """One pass over all rows, those without text included.

        Raises:
            CalibrantError: the source (or one of its files) cannot be read, or none of its rows is usable.
        """

    def describe(self) -> dict[str, Any]:
        """Names and content hashes for a manifest."""


def _some_usable(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows; after the last, an error with the first reason if none was usable."""
    first: Unusable | None = None
    usable = False
    for row in rows:
        if isinstance(row, Unusable):
            first = first or row
        else:
            usable = usable or row.has_text
        yield row
    if first is not None and not usable:
        raise CalibrantError(f"{first.place}: {first.reason}")


class BuiltinSource:
    """The Python language reference that ships with the interpreter."""

    size: int | None = None
    position = 0
    left_out: Sequence[str] = ()

    def rows(self) -> Iterator[Row]:
        """See ``CorpusSource``."""
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield Document(f"python/{name}", topics[name])

    def describe(self) -> dict[str, Any]:
        """See ``CorpusSource``."""
        from pydoc_data.topics import topics

        texts = sha256_json({f"python/{name}": text for name, text in topics.items()})
        return {"kind": "builtin", "name": "python-language-reference", "sha256": texts}


class MemorySource:
    """Texts, conversations, documents or rows that the caller has.

    Lists and iterators are read at once. Any other iterable, such as a ``datasets.Dataset``, is read in every pass.
    """

    size: int | None = None
    position = 0
    left_out: Sequence[str] = ()

    def __init__(self, given: Iterable[Any], field: str) -> None:
        if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
            hint = "; choose one of its splits" if isinstance(given, Mapping) else ""
            raise CalibrantError(f"a corpus is a location or a list of texts, got {type(given).__name__}{hint}")
        if isinstance(given, set | frozenset):
            raise CalibrantError(f"a {type(given).__name__} has another order in every process; give sorted(texts)")
        if hasattr(given, "columns") and (hasattr(given, "iterrows") or hasattr(given, "to_dict")):
            raise CalibrantError(
                f"a {type(given).__name__} is iterated over by columns; give its texts as df[{field!r}].tolist() "
                'or its rows as df.to_dict("records")'
            )
        self._field, self._given = field, given
        self._read: list[Row] | None = None
        if isinstance(given, list | tuple | Iterator):
            found = list(_some_usable(self._row(number, one) for number, one in enumerate(given)))
            if not found:
                raise CalibrantError("the corpus is empty: it has no document")
            if len({row.id for row in found}) < len(found):
                raise CalibrantError("the corpus's documents need different ids: give each its own")
            self._read = found

    def rows(self) -> Iterator[Row]:
        """See ``CorpusSource``."""
        if self._read is not None:
            yield from self._read
        else:
            yield from _some_usable(self._row(number, one) for number, one in enumerate(self._given))

    def _row(self, number: int, given: Any) -> Row:
        name, place = str(number), f"document {number} in memory"
        if isinstance(given, Mapping):
            return row_document(given, self._field, name, place)
        return value_document(given, None, name, place)

    def describe(self) -> dict[str, Any]:
        """See ``CorpusSource``; the hash covers ids and texts, of conversations the messages and tools."""
        digest, count = hashlib.sha256(), 0
        for row in self.rows():
            count += 1
            if isinstance(row, Document):
                held = [row.id, row.messages or row.text, *([row.tools] if row.tools else [])]
                digest.update(sha256_json(held).encode())
        return {"kind": "memory", "name": "memory", "sha256": digest.hexdigest(), "documents": count}


class FileSource:
    """A file, or every readable file in a folder, in the order of their paths.

    Raises:
        CalibrantError: there is no such file or folder, or it contains nothing readable.
    """

    def __init__(self, root: Path, field: str, longest: int) -> None:
        self._root, self._field, self._longest = root, field, longest
        self._paths, cards = _readable_files(root)
        self.left_out = [self._name(path) for path in cards]
        for path in self._paths:
            _check_name(path)
        self.position = 0

    @property
    def size(self) -> int | None:
        """See ``CorpusSource``."""
        return sum(path.stat().st_size for path in self._paths)

    def rows(self) -> Iterator[Row]:
        """See ``CorpusSource``."""
        self.position = 0
        for path in self._paths:
            before = self.position
            try:
                with path.open("rb") as raw:
                    for row in _some_usable(_file_rows(path, raw, self._name(path), self._field, self._longest)):
                        self.position = before + raw.tell()
                        yield row
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
    left_out: Sequence[str] = ()

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

    def rows(self) -> Iterator[Row]:
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
        yield from _some_usable(
            row_document(row, self._field, f"{self.name}/{self.split}:{number}", f"hub:{self.name}, row {number}")
            for number, row in enumerate(rows, start=1)
        )

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


def _readable_files(root: Path) -> tuple[list[Path], list[Path]]:
    """The files of a corpus, and the text files of its folder that are no data."""
    if root.is_file():
        if _suffix(root) not in _SUFFIXES:
            raise CalibrantError(
                f"{root}: unknown kind of corpus file, expected .txt, .jsonl or .parquet (or .gz of these)"
            )
        return [root], []
    if not root.is_dir():
        raise CalibrantError(f"{root}: no such corpus file or folder (a hub data set is written hub:owner/name)")
    files = sorted(p for p in root.rglob("*") if p.is_file() and _suffix(p) in _SUFFIXES and not _is_hidden(p, root))
    cards = [path for path in files if _is_card(path)]
    data = [path for path in files if not _is_card(path)]
    if not data:
        besides = f" besides {cards[0].name}, which is no data unless it is named itself" if cards else ""
        raise CalibrantError(f"{root}: the folder contains no .txt, .jsonl or .parquet file (or .gz of these){besides}")
    return data, cards


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)


def _is_card(path: Path) -> bool:
    return _suffix(path) in _TEXT_SUFFIXES and _CARD.fullmatch(path.name.lower()) is not None


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CalibrantError(f"{str(path)!a}: the file's name is not UTF-8, so no manifest can name it") from error


def _file_rows(path: Path, raw: BinaryIO, name: str, field: str, longest: int) -> Iterator[Row]:
    stream = unpacked(path, raw) if path.suffix.lower() == ".gz" else raw
    if _suffix(path) == ".parquet":
        yield from _parquet_rows(path, stream, name, field)
    elif _suffix(path) == ".jsonl":
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


def _json_lines(path: Path, stream: BinaryIO, name: str, field: str) -> Iterator[Row]:
    number = 0
    while line := stream.readline(_LONGEST_LINE_BYTES):
        number += 1
        if len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_BLOCK_BYTES)
            said = f"longer than {_LONGEST_LINE_BYTES >> 20} MiB"
            yield Unusable(f"{name}:{number}", f"{path}, line {number}", said, too_long=True)
        elif not line.isspace():
            yield _json_row(line, number == 1, field, f"{name}:{number}", f"{path}, line {number}")


def _json_row(line: bytes, is_first: bool, field: str, name: str, place: str) -> Row:
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError:
        return Unusable(name, place, "not UTF-8 text; convert the file first")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Unusable(name, place, f"not JSON ({error})")
    return row_document(row, field, name, place)


def _parquet_rows(path: Path, stream: BinaryIO, name: str, field: str) -> Iterator[Row]:
    import pyarrow.parquet

    with tempfile.TemporaryFile() as plain:
        source: Any = stream
        if path.suffix.lower() == ".gz":
            shutil.copyfileobj(stream, plain)
            source = plain
        try:
            table = pyarrow.parquet.ParquetFile(source)
            columns = table.schema_arrow.names
            if field not in columns:
                raise CalibrantError(f"{path}: no column {field!r} (found: {', '.join(columns)}); name it with `field`")
            read = [column for column in (field, TOOLS) if column in columns]
            if _unpacked_bytes(table.metadata, read) > largest_unpacked(path):
                raise too_large(path)
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=read):
                for values in zip(*(_values(batch.column(column)) for column in read), strict=True):
                    number += 1
                    yield _parquet_row(dict(zip(read, values, strict=True)), field, f"{name}:{number}", path, number)
        except CalibrantError:
            raise
        except Exception as error:  # damaged files make the library raise many unrelated classes
            raise CalibrantError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _unpacked_bytes(metadata: Any, columns: Sequence[str]) -> int:
    """What the columns take unpacked, nested ones with all their parts."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    parts = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(
        part.total_uncompressed_size
        for part in parts
        if any(part.path_in_schema == name or part.path_in_schema.startswith(f"{name}.") for name in columns)
    )


def _values(column: Any) -> list[Any]:
    """The column's values; in place of one that cannot be read stands the error."""
    try:
        return list(column.to_pylist())
    except ValueError:  # bytes that are no UTF-8, times out of range
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except ValueError as error:
        return error


def _parquet_row(row: dict[str, Any], field: str, name: str, path: Path, number: int) -> Row:
    place = f"{path}, row {number}"
    if isinstance(row[field], ValueError):
        return Unusable(name, place, f"column {field!r} cannot be read ({first_line(row[field])})")
    return row_document(row, field, name, place)
