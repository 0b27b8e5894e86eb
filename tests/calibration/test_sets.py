import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import Corpus
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer, tokenizer_files_sha256
from tests.conftest import random_set


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    rows = [json.dumps({"text": f"document {i} " + "abcdefgh"[i % 8] * (10 + 13 * i)}) for i in range(40)]
    path.write_text("\n".join(rows))
    return path


def test_saved_and_loaded_sets_are_equal_and_files_are_reproducible(tmp_path: Path) -> None:
    made = random_set()
    made.save(tmp_path / "a")
    CalibrationSet.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokens.safetensors", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 7), st.integers(0, 31), st.booleans())
def test_one_changed_entry_changes_the_hash(row: int, column: int, in_mask: bool) -> None:
    made = random_set()
    tokens, mask = made.tokens.clone(), made.mask.clone()
    if in_mask:
        mask[row, column] = ~mask[row, column]
    else:
        tokens[row, column] += 1
    assert CalibrationSet.build(tokens, mask, made.manifest).sha256 != made.sha256


@pytest.mark.parametrize("damage", ["tokens", "truncated", "manifest", "missing"])
def test_damaged_sets_are_refused(tmp_path: Path, damage: str) -> None:
    random_set(seed=0).save(tmp_path)
    if damage == "tokens":
        random_set(seed=1).save(tmp_path / "other")
        (tmp_path / "tokens.safetensors").write_bytes((tmp_path / "other" / "tokens.safetensors").read_bytes())
    elif damage == "truncated":
        (tmp_path / "tokens.safetensors").write_bytes((tmp_path / "tokens.safetensors").read_bytes()[:-3])
    elif damage == "manifest":
        (tmp_path / "manifest.json").write_text("{}")
    else:
        (tmp_path / "manifest.json").unlink()
    with pytest.raises(CalibrantError, match=str(tmp_path)):
        CalibrationSet.load(tmp_path)


@pytest.mark.parametrize("windows", ["pack", "window"])
def test_uniform_windows_are_what_the_manifest_says(corpus: Path, llama: Path, windows: str) -> None:
    made = cb.select(corpus, tokenizer=llama, samples=6, length=50, seed=3, windows=windows)
    tokenizer = Tokenizer(llama)
    texts = {document.id: tokenizer.encode(document.text) for document in Corpus(corpus)}
    for row, segments in zip(made.tokens.tolist(), made.manifest.rows, strict=True):
        covered = 0
        for s in segments:
            assert row[s.start : s.start + s.length] == texts[s.document][s.offset : s.offset + s.length]
            covered += s.length
        assert row.count(tokenizer.separator_id) == 50 - covered


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50))
def test_draws_of_one_shuffle_share_no_window_and_do_not_depend_on_each_other(llama_and_corpus, seed: int) -> None:
    llama, corpus = llama_and_corpus
    draws = [cb.select(corpus, tokenizer=llama, samples=4, length=50, seed=seed, draw=k) for k in range(3)]
    together = cb.select(corpus, tokenizer=llama, samples=12, length=50, seed=seed)
    assert torch.equal(torch.cat([draw.tokens for draw in draws]), together.tokens)
    places = [{(s.document, s.offset) for row in draw.manifest.rows for s in row} for draw in draws]
    assert not places[0] & places[1]
    assert not places[1] & places[2]


@pytest.fixture(scope="session")
def llama_and_corpus(model_folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("\n".join(json.dumps({"text": chr(97 + i % 26) * (20 + 7 * i)}) for i in range(40)))
    return model_folder("llama"), path


def test_a_corpus_that_is_too_small_says_how_much_there_is(corpus: Path, llama: Path) -> None:
    with pytest.raises(CalibrantError, match=r"only \d+ windows of 50 tokens in 40 documents"):
        cb.select(corpus, tokenizer=llama, samples=5000, length=50)


def test_short_documents_are_counted(corpus: Path, llama: Path) -> None:
    made = cb.select(corpus, tokenizer=llama, samples=10, length=100, windows="window")
    counts = made.manifest.counts
    assert counts["documents_used"] - counts["documents_too_short"] == 10


def test_the_tokenizer_is_the_same_before_and_after_use(llama: Path, tmp_path: Path) -> None:
    """Files that ask for truncation or padding keep that state until the first call."""
    folder = shutil.copytree(llama, tmp_path / "t")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    fresh, used = Tokenizer(folder), Tokenizer(folder)
    assert len(used.encode("more than five characters")) == 25
    assert fresh.sha256 == used.sha256 == Tokenizer(llama).sha256


def test_what_a_tokenizer_does_decides_and_equal_files_spare_reading_it(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    made = cb.generate(folder, strategy="vocabulary", samples=4, length=32)
    definition = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(definition, indent=7))
    cb.compress(folder, output=tmp_path / "a", recipe="wanda-2:4", calibration=made)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CalibrantError, match="no usable tokenizer"):
        cb.compress(folder, output=tmp_path / "b", recipe="wanda-2:4", calibration=made)
    same_files = made.manifest.model_copy(update={"tokenizer_files_sha256": tokenizer_files_sha256(folder)})
    same = CalibrationSet(made.tokens, made.mask, same_files)
    assert cb.compress(folder, output=tmp_path / "b", recipe="wanda-2:4", calibration=same).layers


def test_vocabulary_draws_every_ordinary_token_and_no_special_one(llama: Path) -> None:
    made = cb.generate(llama, strategy="vocabulary", samples=40, length=60, seed=1)
    assert set(made.tokens.flatten().tolist()) == set(range(4, 99))
    prefix = cb.generate(llama, strategy="vocabulary", samples=5, length=60, seed=1)
    assert torch.equal(prefix.tokens, made.tokens[:5])
    assert made.sha256 != cb.generate(llama, strategy="vocabulary", samples=40, length=60, seed=1, draw=1).sha256
