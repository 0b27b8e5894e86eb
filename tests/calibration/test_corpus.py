import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from calibrant.calibration.corpus import Corpus
from calibrant.errors import CalibrantError

TEXTS = ["one text", "zwei größere Texte", "three"]


def write(path: Path) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        data = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
        data = path.read_bytes()
    else:
        data = TEXTS[1].encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_kind_of_file(tmp_path: Path, kind: str, packed: str) -> None:
    corpus = Corpus(write(tmp_path / f"c.{kind}{packed}"))
    found = [document.text for document in corpus]
    assert found == ([TEXTS[1]] if kind == "txt" else TEXTS)
    assert [document.id for document in corpus] == [document.id for document in corpus]
    assert str(tmp_path) not in json.dumps(corpus.describe())


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl")
    write(tmp_path / "sub" / "a.txt")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert [document.id for document in Corpus(tmp_path)] == ["b.jsonl:1", "b.jsonl:2", "b.jsonl:3", "sub/a.txt"]


def test_the_builtin_corpus_is_real_text() -> None:
    documents = list(Corpus("builtin"))
    assert sum(len(document.text) for document in documents) > 300_000


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n{"text": "  "}\n\n{"text": "b"}\n')
    corpus = Corpus(path)
    assert len(list(corpus)) == 2
    assert corpus.counts["documents_empty"] == 1


@pytest.mark.parametrize(("name", "content", "said"), [
    ("c.jsonl", b'{"text": "a"}\nnot json\n', "line 2"),
    ("c.jsonl", b'{"body": "a"}\n', "name it with `field`"),
    ("c.jsonl", b'{"text": 3}\n', "line 1"),
    ("c.jsonl", b'[1]\n', "line 1"),
    ("c.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
    ("c.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 5000)[:-20], "complete"),
    ("c.txt.gz", b"not gzip at all", "cannot be read"),
    ("c.txt", b"\xff\xfe", "UTF-8"),
    ("c.parquet", b"PAR1 no", "Parquet"),
    ("c.csv", b"a,b", "unknown kind"),
])  # fmt: skip
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrantError, match=said) as caught:
        list(Corpus(path))
    assert name in str(caught.value)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(CalibrantError, match="no such"):
        Corpus(tmp_path / "nowhere")
    with pytest.raises(CalibrantError, match="contains no"):
        Corpus(tmp_path)
    with pytest.raises(CalibrantError, match="owner/name"):
        Corpus("hub:name?colour=red")
