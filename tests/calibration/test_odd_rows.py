"""One odd row never fails a corpus, and every format treats it alike."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import calibrant as cb
from calibrant.calibration.corpus import Corpus
from calibrant.errors import CalibrantError

GOOD = [{"text": f"text {number} of some words"} for number in range(3)]
TALK = {"text": [{"role": "user", "content": "hi"}]}


class Rows:
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


def jsonl(folder: Path, rows: list[Any]) -> Corpus:
    path = folder / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(path)


def given(folder: Path, rows: list[Any]) -> Corpus:
    return Corpus(rows)


def lazily(folder: Path, rows: list[Any]) -> Corpus:
    return Corpus(Rows(rows))


@pytest.mark.parametrize("make", [jsonl, given, lazily])
@pytest.mark.parametrize(("odd", "said"), [
    ({"text": 3}, "neither a text nor a conversation, got int"),
    ({"text": {"a": 1}}, "neither a text nor a conversation, got dict"),
    ({"body": "a"}, "no text under 'text' (found: body); name it with `field`"),
    ({"text": []}, "neither a text nor a conversation, it has no message"),
    ({"text": ["a"]}, "neither a text nor a conversation, message 1 is a str"),
    ({"text": "\ud800"}, "text with half of a surrogate pair, which is not Unicode"),
    ({"text": [{"role": "user", "content": "\ud800"}]}, "text with half of a surrogate pair, which is not Unicode"),
    ({"text": [{"role": "user", "name": "\udfff", "content": "a"}]},
     "text with half of a surrogate pair, which is not Unicode"),
    ({"text": [{"from": "human", "text": "a"}]}, "message 1 has no role (found: from, text)"),
    ({"text": [{"from": 3, "value": "a"}]}, "message 1 has no role (found: from, value)"),
    ({"text": [*TALK["text"], {"role": 3, "content": "a"}]}, "message 2 has no role (found: role, content)"),
    ({"text": [{"role": "user", "content": 3}]}, "the content of message 1 is neither a text nor a list of texts"),
    ({"text": [{"role": "user", "content": [{"type": "image"}]}]},
     "message 1 has a part of type image, which is no text"),
    ({"text": [{"role": "user", "content": [{"type": "text"}]}]}, "the content of message 1 has a part without a text"),
    ({**TALK, "tools": "{"}, "'tools' is a text, but not JSON"),
    ({**TALK, "tools": [3]}, "'tools' is no list of descriptions of functions"),
    ({"text": [{"role": "user", "content": "a", "score": float("nan")}]}, "a message holds nan"),
])  # fmt: skip
def test_an_odd_row_is_left_out_and_counted(make, odd: Any, said: str, tmp_path: Path) -> None:
    corpus = make(tmp_path, [*GOOD[:2], odd, GOOD[2], odd])
    for _ in range(2):
        assert [document.text for document in corpus] == [row["text"] for row in GOOD]
        assert corpus.counts["documents_unusable"] == 2
    (note,) = corpus.notes
    assert "left out 2 rows that cannot be used" in note
    assert said in note
    with pytest.raises(CalibrantError) as caught:
        list(make(tmp_path, [odd, {"text": " "}]))
    assert said in str(caught.value)


@pytest.mark.parametrize("line", [b"not json", b"[1]", b"3", b'{"text": "\xff"}', b'{"text": ' + b"[" * 100_000])
def test_an_odd_line_is_left_out_and_counted(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    corpus = Corpus(path)
    assert [document.id for document in corpus] == ["c.jsonl:1", "c.jsonl:3"]
    assert f"{path}, line 2: " in corpus.notes[0]


def not_utf8(texts: list[bytes]) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts, pyarrow.binary()).buffers())


def test_an_odd_cell_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8([b"a", b"\xff", b"b"])}), path)
    corpus = Corpus(path)
    assert [document.id for document in corpus] == ["c.parquet:1", "c.parquet:3"]
    assert f"{path}, row 2: column 'text' cannot be read" in corpus.notes[0]
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8([b"\xff"])}), path)
    with pytest.raises(CalibrantError, match=r"row 1: column 'text' cannot be read"):
        list(Corpus(path))


@pytest.mark.parametrize("column", ["when", "tools"])
@pytest.mark.parametrize("kind", [pyarrow.timestamp("ns"), pyarrow.int64(), pyarrow.duration("ns")])
def test_columns_beside_the_text_do_not_matter(column: str, kind: pyarrow.DataType, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    table = {"text": ["a", None, "b"], column: pyarrow.array([1, 2, 3], pyarrow.int64()).cast(kind)}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    corpus = Corpus(path)
    assert [document.text for document in corpus] == ["a", "b"]
    assert corpus.counts == {"documents_empty": 1, "documents_too_long": 0, "documents_unusable": 0}


def test_the_set_says_what_was_left_out(llama: Path, tmp_path: Path) -> None:
    class Notes:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def task(self, label: str, total: int | None, unit: str = "") -> Any:
            from calibrant.progress import NoProgress

            return NoProgress().task(label, total)

        def note(self, text: str) -> None:
            self.seen.append(text)

    rows = [{"text": "many words of a text " * 9}] * 8 + [{"text": 3}, {"body": ""}]
    for options in ({}, {"strategy": "zipcal"}, {"strategy": "zipcal", "parts": 2}, {"strategy": "unigram"}):
        notes = Notes()
        made = cb.select(
            jsonl(tmp_path, rows), tokenizer=llama, samples=2, length=16, progress=notes, **options
        )  # fmt: skip
        assert made.manifest.counts["documents_unusable"] == 2
        assert made.manifest.corpora[0]["first_unusable"] == "c.jsonl:9: neither a text nor a conversation, got int"
        assert [note for note in notes.seen if "left out 2 rows" in note] == notes.seen
    made.save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").changes == []
