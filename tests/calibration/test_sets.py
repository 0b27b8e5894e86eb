import json
import os
import shutil
import stat
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
    draws = [cb.select(corpus, tokenizer=llama, samples=4, length=50, seed=seed, draw=k, stride=4) for k in range(3)]
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


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_a_set_has_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        random_set().save(tmp_path / "set")
    finally:
        os.umask(before)
    for path in (tmp_path / "set").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "set").stat().st_mode) == 0o777 & ~umask


def test_a_set_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = random_set(seed=0), random_set(seed=1)
    first.save(tmp_path / "set")
    with pytest.raises(CalibrantError, match="`overwrite=True`"):
        second.save(tmp_path / "set")

    def fails(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fails)
        with pytest.raises(CalibrantError, match="no space left"):
            second.save(tmp_path / "set", overwrite=True)
        with pytest.raises(CalibrantError, match="no space left"):
            second.save(tmp_path / "new")
    assert CalibrationSet.load(tmp_path / "set").sha256 == first.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    second.save(tmp_path / "set", overwrite=True)
    assert CalibrationSet.load(tmp_path / "set").sha256 == second.sha256


def changed(folder: Path, change) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("change", [
    lambda m: m["corpora"][0].pop("rows"),
    lambda m: m["corpora"][0].pop("name"),
    lambda m: m["corpora"][0].update(rows="many"),
    lambda m: m["corpora"][0].update(rows=-1),
    lambda m: m["corpora"][0].update(name=["a"]),
    lambda m: m["corpora"][0].update(field=3),
    lambda m: m["corpora"][0].update(files=["a"]),
    lambda m: m.update(corpora=["a"]),
    lambda m: m.update(evaluations=[{"kind": "files"}]),
    lambda m: m.update(samples="8"),
    lambda m: m.update(samples=10**18),
    lambda m: m.update(length=-1),
    lambda m: m.update(seed=-1),
    lambda m: m.update(model={"device": 3}),
    lambda m: m.update(locations={"model": "m"}),
    lambda m: m.update(rows=[[{"document": "a", "offset": -1, "start": 0, "length": 1}]]),
    lambda m: m.update(counts={"tokens": 1.5}),
    lambda m: m.update(parameters=[]),
    lambda m: m.update(parameters={"x": float("nan")}),
    lambda m: m.update(strategy="\ud800"),
    lambda m: m.update(more=1),
])  # fmt: skip
def test_manifests_of_strangers_are_checked_before_use(corpus: Path, llama: Path, tmp_path: Path, change) -> None:
    cb.select(corpus, tokenizer=llama, samples=2, length=32).save(tmp_path / "set")
    folder = changed(tmp_path / "set", change)
    for use in (CalibrationSet.load, cb.rebuild, lambda f: cb.rebuild(f / "manifest.json")):
        with pytest.raises(CalibrantError, match=r"manifest\.json: not a calibration manifest") as caught:
            use(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"batch_size": "64"}, {"batch_size": 0}, {"batch_size": 10**12}, {"device": 3}, {"compute_dtype": ["float32"]},
    {"temperature_steps": 10**30},
    {"temperature_initial": "hot"}, {"temperature_initial": -1.0}, {"temperature_steps": 1.5}, {"first_tokens": "x"},
    {"compute_dtype": "float7"}, {"device": "abacus"},
])  # fmt: skip
def test_parameters_of_strangers_are_checked_before_a_model_writes(llama: Path, tmp_path: Path, change) -> None:
    made = cb.generate(llama, samples=1, length=4)
    made.save(tmp_path / "set")
    changed(tmp_path / "set", lambda m: m["parameters"].update(change))
    with pytest.raises(CalibrantError):
        cb.rebuild(tmp_path / "set")


@pytest.mark.parametrize("change", [
    {"windows": 3}, {"filters": []}, {"filters": {"leakage": 3}}, {"mix": {"scripts": "x"}}, {"pool": "a"},
    {"percentile": "x"}, {"unknown": 1}, {"weights": ["a"]}, {"embedding": 7}, {"filters": {"leakage": ["\0"]}},
])  # fmt: skip
def test_requests_of_strangers_are_checked_before_a_corpus_is_read(corpus, llama, tmp_path: Path, change) -> None:
    cb.select(corpus, tokenizer=llama, samples=2, length=32).save(tmp_path / "set")
    changed(tmp_path / "set", lambda m: m["parameters"].update(change))
    with pytest.raises(CalibrantError, match=r"set: "):
        cb.rebuild(tmp_path / "set")


def test_token_ids_below_zero_are_refused(tmp_path: Path) -> None:
    made = random_set()
    tokens = made.tokens.clone()
    tokens[0, 0] = -1
    CalibrationSet.build(tokens, made.mask, made.manifest).save(tmp_path / "set")
    with pytest.raises(CalibrantError, match="token ids range from -1"):
        CalibrationSet.load(tmp_path / "set")


@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (0, 1, 0), (3, 0, 1)])
def test_a_set_with_a_corpus_of_no_share_is_made_again(corpus: Path, llama: Path, tmp_path: Path, weights) -> None:
    places = []
    for number in range(len(weights)):
        places.append(tmp_path / f"{number}.jsonl")
        places[-1].write_text(corpus.read_text().replace("document", f"text {number}"))
    made = cb.select(places, tokenizer=llama, samples=4, length=40, weights=weights)
    assert [one["rows"] > 0 for one in made.manifest.corpora] == [weight > 0 for weight in weights]
    assert {int(s.document.split("/")[0]) for row in made.manifest.rows for s in row} == {
        number for number, weight in enumerate(weights) if weight
    }
    made.save(tmp_path / "set")
    again = cb.rebuild(tmp_path / "set")
    assert again.changes == []
    assert again.calibration.sha256 == made.sha256


def test_what_a_set_depends_on_is_recorded_and_named(corpus: Path, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    made = cb.select(corpus, tokenizer=folder, samples=2, length=32)
    assert {"python", "jinja2", "pyarrow", "tokenizers", "transformers"} <= set(made.manifest.versions)
    made.save(tmp_path / "set")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<s>"}))
    changed(tmp_path / "set", lambda m: m["versions"].update(jinja2="3.0"))
    changes = cb.rebuild(tmp_path / "set").changes
    assert changes[0] == "the files of the tokenizer (its special tokens or other settings)"
    assert changes[1].startswith("jinja2 3.0 is now 3.")
    assert len(changes) == 2
