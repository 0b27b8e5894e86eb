"""Where a corpus's documents come from: files, the hub, Python's own documentation, or memory."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from calibrant.calibration.corpus_files import check_name, readable_files
from calibrant.calibration.document import Document, Row, Unusable, row_document, value_document
from calibrant.calibration.file_rows import file_rows
from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file, sha256_json

HUB = "hub:"


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
        self._paths, cards = readable_files(root)
        self.left_out = [self._name(path) for path in cards]
        for path in self._paths:
            check_name(path)
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
                    for row in _some_usable(file_rows(path, raw, self._name(path), self._field, self._longest)):
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


def _datasets() -> Any:
    """The library that reads the hub's data sets; said to be missing before the network is asked for anything."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrantError("hub data sets need the extra: pip install 'calibrant[hub]'") from error
    return datasets


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
        self._datasets = _datasets()
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
            rows = self._datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
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
