import gzip
import json
import os
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
    ("c.jsonl", b'not json\n{"text": " "}\n{"text": 3}\n', "line 1: not JSON"),
    ("c.jsonl", b'{"body": "a"}\n', "name it with `field`"),
    ("c.jsonl", b'{"text": 3}\n', "line 1"),
    ("c.jsonl", b'[1]\n', "line 1"),
    ("c.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
    ("c.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 5000, mtime=0)[:-20], "complete"),
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


@pytest.mark.parametrize("stray", [
    "README.md", "readme.txt", "README_de.md", "LICENSE.txt", "LICENSE-MIT.md", "licence.txt", "COPYING.txt",
    "NOTICE.txt", "CHANGELOG.md", "sub/README.md", "_README.md", "00_readme.txt", "1. README.md", "UNLICENSE.txt",
    "SECURITY.md", "CODE_OF_CONDUCT.md", "dataset_card.md", "requirements.txt", "requirements-dev.txt",
    "SHA256SUMS.txt", "md5sums.txt", "data.checksums.txt",
])  # fmt: skip
def test_what_a_data_set_keeps_beside_its_data_is_no_corpus(tmp_path: Path, stray: str) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "data.jsonl")
    (tmp_path / stray).write_text("card words")
    corpus = Corpus(tmp_path)
    assert [document.id for document in corpus] == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:3"]
    assert corpus.notes == [f"{tmp_path}: left out as no data: {stray}"]
    assert list(corpus.describe()["files"]) == ["data.jsonl"]
    assert [document.text for document in Corpus(tmp_path / stray)] == ["card words"]


@pytest.mark.parametrize(
    "stray", [".hidden.txt", "._data.jsonl", ".ipynb_checkpoints/data.jsonl", ".git/a/b.txt", "__pycache__/a.txt"]
)
def test_what_is_hidden_is_no_corpus(tmp_path: Path, stray: str) -> None:
    folder = tmp_path / ".corpus"  # the folder itself may be hidden
    (folder / stray).parent.mkdir(parents=True, exist_ok=True)
    write(folder / "data.jsonl")
    (folder / stray).write_bytes(b"\0\5\x16\7")
    corpus = Corpus(folder)
    assert len(list(corpus)) == 3
    assert corpus.notes == []


@pytest.mark.parametrize("name", ["licensed_texts.txt", "readmes.jsonl", "noticeboard.md", "authors.jsonl",
    "opossums.txt", "1.txt", "requirements.jsonl", "securities.txt"])  # fmt: skip
def test_names_that_only_begin_alike_are_data(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert list(Corpus(tmp_path).describe()["files"]) == [name]


def test_a_folder_of_cards_says_so(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card words")
    with pytest.raises(CalibrantError, match=r"besides README.md, which is no data unless it is named itself"):
        Corpus(tmp_path)


@pytest.mark.parametrize("codec", ["zstd", "snappy", "gzip", "brotli"])
@pytest.mark.parametrize("nested", [False, True])
def test_parquet_that_unpacks_without_end_is_refused(tmp_path: Path, codec: str, nested: bool, monkeypatch) -> None:
    monkeypatch.setattr("calibrant.calibration.packed._ALWAYS_ALLOWED_BYTES", 1 << 20)
    monkeypatch.setattr("calibrant.calibration.packed._LARGEST_RATIO", 10)
    path, text = tmp_path / "c.parquet", "a" * (4 << 20)
    rows = pyarrow.table({"text": [[{"role": "user", "content": text}] if nested else text], "other": ["b"]})
    pyarrow.parquet.write_table(rows, path, compression=codec, use_dictionary=False)
    with pytest.raises(CalibrantError, match=r"c.parquet: unpacks to more than 10 times its size"):
        list(Corpus(path))
    assert [document.text for document in Corpus(path, "other")] == ["b"]


@pytest.mark.parametrize("name", ["c.txt.gz", "c.jsonl.gz", "c.parquet.gz"])
def test_what_unpacks_without_end_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrant.calibration.packed._ALWAYS_ALLOWED_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(bytes(4 << 20)))
    with pytest.raises(CalibrantError, match=f"{name}: unpacks to more than 100 times its size"):
        list(Corpus(tmp_path / name))


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("text")
    with pytest.raises(CalibrantError, match="the file's name is not UTF-8"):
        Corpus(tmp_path)


def test_rows_keep_their_line_numbers_after_runs_of_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n' + b"\n" * 3_000_000 + b' \n\r\n{"text": "b"}\n\n')
    assert [(one.id, one.text) for one in Corpus(path)] == [("c.jsonl:2", "a"), ("c.jsonl:3000005", "b")]


def test_the_texts_of_several_fields_are_joined(tmp_path: Path) -> None:
    rows = [{"premise": "It rains.", "hypothesis": "It is wet."}, {"premise": "Sun.", "hypothesis": None}]
    bad = [{"premise": "It rains."}, {"premise": "a", "hypothesis": 5}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + bad))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for source in (tmp_path / "c.jsonl", tmp_path / "c.parquet", rows):
        corpus = Corpus(source, "premise, hypothesis")
        assert [one.text for one in corpus] == ["It rains.\nIt is wet.", "Sun."]
    corpus = Corpus(tmp_path / "c.jsonl", "premise,hypothesis")
    assert len(list(corpus)) == 2
    assert corpus.counts["documents_unusable"] == 2
    assert corpus.first_unusable is not None
    assert "no text under 'hypothesis'" in corpus.first_unusable
    with pytest.raises(CalibrantError, match="no column 'answer'"):
        list(Corpus(tmp_path / "c.parquet", "premise,answer"))


def test_a_field_with_a_comma_in_its_name_is_one_field() -> None:
    assert [one.text for one in Corpus([{"a,b": "x", "a": "y", "b": "z"}], "a,b")] == ["x"]
