"""Filters: what each drops, what it must not drop, and that the manifest counts it."""

import json
from pathlib import Path

import numpy as np
import pytest

import calibrant as cb
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.document import Document
from calibrant.calibration.filters.content import LengthBetween, RepetitionBelow, ScriptIs
from calibrant.calibration.filters.duplicates import ExactDuplicates, NearDuplicates
from calibrant.calibration.filters.leakage import Leakage
from calibrant.errors import CalibrantError

WORDS = [f"w{i}" for i in range(5000)]


def document(text: str) -> Document:
    return Document("d", text)


def sentence(seed: int, count: int = 300) -> list[str]:
    return list(np.random.default_rng(seed).choice(WORDS, count))


def test_exact_duplicates_ignore_the_space_around() -> None:
    kept = ExactDuplicates()
    assert [kept.keeps(document(text)) for text in ("a b", " a b\n", "a  b", "A b", "a b")] == [
        True,
        False,
        True,
        True,
        False,
    ]


def test_near_duplicates_are_found_and_others_are_not() -> None:
    near = NearDuplicates(np.random.default_rng(0))
    base = sentence(0)
    assert near.keeps(document(" ".join(base)))
    changed = list(base)
    changed[100:105] = ["other"] * 5
    assert not near.keeps(document(" ".join(changed).upper().replace("W1 ", "W1, ")))
    assert all(near.keeps(document(" ".join(sentence(seed)))) for seed in range(1, 200))
    half = base[:150] + sentence(999, 150)
    assert near.keeps(document(" ".join(half)))
    assert near.keeps(document("short"))
    assert not near.keeps(document("Short!"))


def test_length_repetition_and_script() -> None:
    assert [LengthBetween(2, 3).keeps(document("x" * n)) for n in range(1, 5)] == [False, True, True, False]
    varied, repeated = " ".join(sentence(0)), "all work and no play makes jack a dull boy " * 30
    assert RepetitionBelow(0.2).keeps(document(varied))
    assert not RepetitionBelow(0.2).keeps(document(repeated))
    assert RepetitionBelow(0.0).keeps(document("too short to repeat"))
    for text, script in (("Hello, wörld 1", "LATIN"), ("Привет", "CYRILLIC"), ("漢字です", "CJK"), ("안녕", "HANGUL")):
        assert ScriptIs(script).keeps(document(text))
        assert not ScriptIs("GREEK").keeps(document(text))
    assert not ScriptIs("LATIN").keeps(document("123 !?"))


def test_leakage_is_a_shared_run_of_words() -> None:
    question = sentence(5, 40)
    leak = Leakage([document(" ".join(question)), document("what is the capital of France")], run=13)
    inside = sentence(6, 50) + question[10:23] + sentence(7, 50)
    nearly = sentence(6, 50) + question[10:22] + sentence(7, 50)
    assert not leak.keeps(document(", ".join(inside)))
    assert leak.keeps(document(" ".join(nearly)))
    assert not leak.keeps(document("They asked: What is the capital of France?"))
    assert leak.leaked == 2
    counting = Leakage([document(" ".join(question))], remove=False)
    assert counting.keeps(document(" ".join(inside)))
    assert counting.leaked == 1


def test_the_manifest_counts_what_was_dropped(tmp_path: Path, llama: Path) -> None:
    texts = [" ".join(sentence(seed, 60)) for seed in range(20)]
    texts += [texts[0], texts[1] + " x", "short", "слово " * 40, texts[2][:200] + " " + texts[3][:200]]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "test.txt").write_text(texts[5])
    filters = cb.FilterRequest(
        duplicates="near", min_characters=20, script="latin", leakage=(str(tmp_path / "test.txt"),)
    )
    for strategy in ("uniform", "zipcal"):
        made = cb.select(path, tokenizer=llama, strategy=strategy, samples=4, length=40, filters=filters)
        counts = made.manifest.counts
        assert counts["documents"] == 25
        assert counts["documents_wrong_length"] == 1
        assert counts["documents_other_script"] == 1
        assert counts["documents_duplicate"] == 1
        assert counts["documents_near_duplicate"] == 1
        assert counts["documents_leaked"] == counts["documents_with_leakage"] == 1
        used = {segment.document for row in made.manifest.rows for segment in row}
        assert not used & {"c.jsonl:21", "c.jsonl:22", "c.jsonl:23", "c.jsonl:24", "c.jsonl:6"}
        made.save(tmp_path / strategy)
        assert cb.rebuild(tmp_path / strategy).calibration.sha256 == made.sha256
    nothing = cb.FilterRequest(min_characters=10**6)
    with pytest.raises(cb.CalibrantError, match="no document is left"):
        cb.select(path, tokenizer=llama, samples=4, length=40, filters=nothing)


def test_very_long_rows_are_counted_and_long_files_are_read_in_pieces(tmp_path: Path) -> None:
    line = "All work and no play.\n"
    (tmp_path / "long.txt").write_text(line * 400_000)
    pieces = list(Corpus(tmp_path / "long.txt"))
    assert [piece.id for piece in pieces] == ["long.txt#1", "long.txt#2", "long.txt#3"]
    assert "".join(piece.text for piece in pieces) == line * 400_000
    assert all(piece.text.endswith("\n") for piece in pieces)
    rows = [{"text": "short"}, {"text": "x" * 50_000_000}, {"text": ""}, {"text": "end"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus(tmp_path / "rows.jsonl")
    assert [document.id for document in corpus] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert corpus.counts == {"documents_empty": 1, "documents_too_long": 1, "documents_unusable": 0}
    assert corpus.position == corpus.size


def test_texts_that_are_found_everywhere_are_not_looked_for() -> None:
    found = Leakage([Document("a", "the"), Document("b", "one two three four five six")])
    assert found.too_short == 1
    assert found.keeps(Document("c", "the cat"))
    assert not found.keeps(Document("d", "zero one two three four five six seven"))
    with pytest.raises(CalibrantError, match="contain nothing to search for"):
        Leakage([Document("a", "the")])
