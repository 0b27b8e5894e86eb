"""Rows of a corpus file: text, JSON Lines or Parquet, each also packed with gzip."""

import codecs
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibrant.calibration.corpus_files import suffix_of
from calibrant.calibration.document import NAME_THE_FIELD, TOOLS, Document, Row, Unusable, field_names, row_document
from calibrant.calibration.packed import largest_unpacked, too_large, unpacked
from calibrant.errors import CalibrantError, first_line

_BLOCK_BYTES = 1 << 20
# A text of the greatest length with every character escaped takes 24 MB of JSON.
_LONGEST_LINE_BYTES = 32 << 20
# Few, because a value may be large.
_ROWS_AT_ONCE = 1024


def file_rows(path: Path, raw: io.BufferedReader, name: str, field: str, longest: int) -> Iterator[Row]:
    """The rows of the file ``path``, open as ``raw``.

    Args:
        path: the file; its suffix says the format.
        raw: its bytes.
        name: what ids of rows begin with.
        field: key or column of the text, or several, with commas.
        longest: characters of the longest document that a text file is cut into.

    Raises:
        CalibrantError: the file is damaged, lacks ``field``, or unpacks to too much.
    """
    stream = unpacked(path, raw) if path.suffix.lower() == ".gz" else raw
    if suffix_of(path) == ".parquet":
        yield from _parquet_rows(path, stream, name, field)
    elif suffix_of(path) == ".jsonl":
        yield from _json_lines(path, stream, name, field)
    else:
        yield from _text_pieces(path, stream, name, longest)


def _text_pieces(path: Path, stream: io.BufferedReader, name: str, longest: int) -> Iterator[Document]:
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


def _json_lines(path: Path, stream: io.BufferedReader, name: str, field: str) -> Iterator[Row]:
    number = 0
    while line := stream.readline(_LONGEST_LINE_BYTES):
        number += 1
        if len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_BLOCK_BYTES)
            said = f"longer than {_LONGEST_LINE_BYTES >> 20} MiB"
            yield Unusable(f"{name}:{number}", f"{path}, line {number}", said, too_long=True)
        elif line.isspace():
            number += _skip_empty_lines(stream)
        else:
            yield _json_row(line, number == 1, field, f"{name}:{number}", f"{path}, line {number}")


def _skip_empty_lines(stream: io.BufferedReader) -> int:
    """Read on to the next line that is not empty; the number of lines skipped.

    A packed file of a megabyte may hold a hundred million of them.
    """
    skipped = 0
    while block := stream.peek():
        empty = len(block) - len(block.lstrip(b"\n"))
        if not empty:
            break
        skipped += len(stream.read(empty))
    return skipped


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


def _parquet_rows(path: Path, stream: io.BufferedReader, name: str, field: str) -> Iterator[Row]:
    import pyarrow.parquet

    with tempfile.TemporaryFile() as plain:
        source: Any = stream
        if path.suffix.lower() == ".gz":
            shutil.copyfileobj(stream, plain)
            source = plain
        try:
            sizes = _unpacked_bytes(path, source)
            table = pyarrow.parquet.ParquetFile(source)
            columns = table.schema_arrow.names
            wanted = field_names(field, columns)
            for one in wanted:
                if one not in columns:
                    found = ", ".join(columns)
                    raise CalibrantError(f"{path}: no column {one!r} (found: {found}); {NAME_THE_FIELD}")
            read = [column for column in (*wanted, TOOLS) if column in columns]
            parts = [size for part, size in sizes if any(part == one or part.startswith(f"{one}.") for one in read)]
            if sum(parts) > largest_unpacked(path):
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


# pyarrow ends its process on some damaged metadata of columns, so another one reads them.
_READ_SIZES = """
import json, pyarrow.parquet
metadata = pyarrow.parquet.read_metadata(open(0, "rb", closefd=False))
groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
parts = (group.column(number) for group in groups for number in range(group.num_columns))
print(json.dumps([(part.path_in_schema, part.total_uncompressed_size) for part in parts]))
"""


def _unpacked_bytes(path: Path, file: Any) -> list[tuple[str, int]]:
    """Name and unpacked bytes of the columns in every group of rows of the open ``file``, nested ones by their parts.

    Raises:
        CalibrantError: the file is damaged.
    """
    file.seek(0)
    ran = subprocess.run([sys.executable, "-I", "-c", _READ_SIZES], stdin=file, capture_output=True, check=False)
    file.seek(0)
    if ran.returncode:
        last = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2].strip()
        said = last.partition(": ")[2] or last  # without the name of the exception
        raise CalibrantError(f"{path}: not a readable Parquet file ({said})")
    return [(str(name), int(size)) for name, size in json.loads(ran.stdout)]


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
    for column in field_names(field, row):
        if isinstance(row[column], ValueError):
            return Unusable(name, place, f"column {column!r} cannot be read ({first_line(row[column])})")
    return row_document(row, field, name, place)
