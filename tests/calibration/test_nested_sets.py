"""Sets of growing size: which draws are nested, heads of sets, and what their manifests say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from tests.conftest import random_set


def write_corpus(path: Path, documents: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz    "))
    texts = ["".join(rng.choice(letters, rng.integers(5, 200))) + "." for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", 120)


@pytest.fixture(scope="module")
def tiny(model_folder) -> Path:
    return model_folder("llama")


def places(made: CalibrationSet) -> set[tuple[str, int]]:
    return {(segment.document, segment.offset) for row in made.manifest.rows for segment in row}


NESTED = [
    {"strategy": "uniform"},
    {"strategy": "uniform", "windows": "window"},
    {"strategy": "unigram"},
    {"strategy": "zipcal"},
    {"strategy": "zipcal", "pool": 20},
    {"strategy": "zipf"},
    {"strategy": "perplexity", "keep": "lowest", "windows": "document"},
    {"strategy": "perplexity", "keep": "below", "windows": "document"},
    {"strategy": "k-centre"},
    {"strategy": "herding"},
]


@pytest.mark.parametrize("options", NESTED, ids=lambda options: " ".join(map(str, options.values())))
def test_a_smaller_set_is_the_first_rows_of_a_larger_one(corpus: Path, tiny: Path, options) -> None:
    drawn = options["strategy"] in ("uniform", "unigram")
    common = {**options, "tokenizer": tiny, "length": 20, "seed": 1, "draw": 1}
    common |= {"stride": 16} if drawn else {"shards": 2}
    small, large = (cb.select(corpus, samples=samples, **common) for samples in (5, 16))
    assert torch.equal(small.tokens, large.tokens[:5])
    assert small.manifest.rows == large.manifest.rows[:5]


def test_nested_sets_of_words_dataset(tiny: Path, tmp_path: Path) -> None:
    """Draw k of n rows is rows k * stride to k * stride + n of draw 0 of all rows."""
    path = write_corpus(tmp_path / "words.jsonl", 500)
    common = {"tokenizer": tiny, "length": 20, "seed": 1, "strategy": "words_dataset"}
    small, large = (cb.select(path, samples=samples, draw=1, stride=16, **common) for samples in (5, 16))
    everything = cb.select(path, samples=32, **common)
    assert torch.equal(small.tokens, large.tokens[:5])
    assert torch.equal(large.tokens, everything.tokens[16:])


@pytest.mark.parametrize("strategy", ["self", "vocabulary"])
def test_a_smaller_generated_set_is_the_first_rows_of_a_larger_one(tiny: Path, strategy: str) -> None:
    common = {"strategy": strategy, "length": 24, "seed": 1, "draw": 1, "dtype": "float32"}
    small, large = (cb.generate(tiny, samples=samples, **common) for samples in (3, 10))
    assert torch.equal(small.tokens, large.tokens[:3])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50), st.integers(1, 8), st.integers(0, 8), st.sampled_from(["uniform", "unigram"]))
def test_draws_share_nothing_at_any_size_up_to_their_stride(corpus, tiny, seed, samples, more, strategy) -> None:
    """Draw k of n rows is rows k * stride to k * stride + n of draw 0 of all rows."""
    common = {"tokenizer": tiny, "length": 10, "seed": seed, "strategy": strategy}
    stride = samples + more
    draws = [cb.select(corpus, samples=samples, stride=stride, draw=k, **common) for k in range(3)]
    everything = cb.select(corpus, samples=3 * stride, **common)
    for k, draw in enumerate(draws):
        assert torch.equal(draw.tokens, everything.tokens[k * stride : k * stride + samples])


@pytest.mark.parametrize("strategy", ["uniform", "unigram"])
def test_draws_begin_128_rows_apart_unless_sets_are_larger(corpus: Path, tiny: Path, strategy: str) -> None:
    common = {"tokenizer": tiny, "length": 10, "strategy": strategy}
    eight, more = (cb.select(corpus, samples=samples, draw=1, **common) for samples in (8, 128))
    assert torch.equal(eight.tokens, more.tokens[:8])
    assert eight.manifest.parameters["stride"] == more.manifest.parameters["stride"] == 128
    largest = cb.select(corpus, samples=150, **common)
    assert largest.manifest.parameters["stride"] == 150
    assert torch.equal(largest.tokens[128:136], eight.tokens)


def test_a_strategy_without_draws_records_no_stride(corpus: Path, tiny: Path) -> None:
    made = cb.select(corpus, tokenizer=tiny, samples=4, length=20, strategy="zipcal")
    assert "stride" not in made.manifest.parameters


@pytest.mark.parametrize("strategy", ["uniform", "unigram"])
def test_a_corpus_too_small_for_a_stride_says_so(corpus: Path, tiny: Path, strategy: str) -> None:
    common = {"tokenizer": tiny, "samples": 4, "length": 60, "strategy": strategy}
    with pytest.raises(CalibrantError, match="use a smaller `stride`, fewer samples"):
        cb.select(corpus, draw=2, **common)
    assert cb.select(corpus, draw=2, stride=4, **common).tokens.shape == (4, 60)
    with pytest.raises(CalibrantError, match="needed; use fewer samples"):
        cb.select(corpus, **{**common, "samples": 100_000})


@pytest.mark.parametrize("strategy", ["uniform", "unigram"])
def test_sets_from_before_strides_are_made_again(corpus: Path, tiny: Path, tmp_path: Path, strategy: str) -> None:
    """Their draws followed one another, and their manifests say nothing of it."""
    made = cb.select(corpus, tokenizer=tiny, samples=6, length=20, draw=2, stride=6, strategy=strategy)
    made.save(tmp_path / "set")
    file = tmp_path / "set" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["parameters"]["stride"], manifest["head_of"]
    file.write_text(json.dumps(manifest))
    rebuilt = cb.rebuild(tmp_path / "set")
    assert rebuilt.calibration.sha256 == made.sha256
    assert rebuilt.changes == []


def test_corpora_and_groups_share_the_stride(corpus: Path, tiny: Path, tmp_path: Path) -> None:
    """Draws of several corpora and of mixes are disjoint, and a smaller one lies within a larger one."""
    other = write_corpus(tmp_path / "other.jsonl", 120, seed=1)
    for source, options in (([corpus, other], {"weights": [3, 1]}), (corpus, {"mix": cb.MixRequest(lengths=(90,))})):
        common = {"tokenizer": tiny, "length": 10, "stride": 64, **options}
        small, large = (cb.select(source, samples=samples, draw=1, **common) for samples in (8, 64))
        assert places(small) < places(large)
        assert not places(large) & places(cb.select(source, samples=64, draw=0, **common))


def test_a_head_is_the_first_rows_and_says_so(corpus: Path, tiny: Path, tmp_path: Path) -> None:
    made = cb.select(corpus, tokenizer=tiny, samples=12, length=20, strategy="cola", windows="document")
    head = made.head(5)
    assert torch.equal(head.tokens, made.tokens[:5])
    assert head.manifest.rows == made.manifest.rows[:5]
    assert (head.manifest.samples, head.manifest.head_of) == (5, 12)
    assert [one["rows"] for one in head.manifest.corpora] == [5]
    assert head.manifest.counts["tokens"] == 100
    assert head.manifest.counts["documents"] == 120
    assert "clusters" in made.manifest.counts
    assert "clusters" not in head.manifest.counts
    assert head.sha256 == CalibrationSet.build(made.tokens[:5], made.mask[:5], made.manifest).sha256
    assert head.head(3).manifest == made.head(3).manifest
    assert made.head(12) is made
    head.save(tmp_path / "head")
    assert CalibrationSet.load(tmp_path / "head").manifest == head.manifest
    rebuilt = cb.rebuild(tmp_path / "head")
    assert rebuilt.changes == []
    assert rebuilt.calibration.manifest == head.manifest
    assert torch.equal(rebuilt.calibration.tokens, head.tokens)


@pytest.mark.parametrize("strategy", ["self", "llm-qat", "prefix"])
def test_heads_of_generated_sets_are_made_again(corpus: Path, tiny: Path, tmp_path: Path, strategy: str) -> None:
    texts = {"corpus": corpus} if strategy == "prefix" else {}
    head = cb.generate(tiny, strategy=strategy, samples=6, length=20, **texts).head(2)
    head.save(tmp_path / "head")
    assert cb.rebuild(tmp_path / "head").calibration.sha256 == head.sha256


def test_a_head_of_two_corpora_counts_the_rows_of_each(corpus: Path, tiny: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.jsonl", 30, seed=1)
    made = cb.select([corpus, other], tokenizer=tiny, samples=8, length=20)
    for samples, rows in ((3, [3, 0]), (6, [4, 2])):
        assert [one["rows"] for one in made.head(samples).manifest.corpora] == rows


@pytest.mark.parametrize("samples", [0, -1, 9])
def test_a_head_needs_rows_that_are_there(samples: int) -> None:
    with pytest.raises(CalibrantError, match="use 1 to 8"):
        random_set(samples=8).head(samples)


def test_a_head_needs_a_token_that_counts() -> None:
    ids = torch.ones(4, 3, dtype=torch.int32)
    made = CalibrationSet.from_tokens(ids, ids.bool() & (torch.arange(4) > 1)[:, None])
    with pytest.raises(CalibrantError, match="no token of the set's first 2 rows counts"):
        made.head(2)
    assert made.head(3).manifest.counts["rows_without_a_counted_token"] == 2


def test_a_manifest_of_a_head_of_fewer_rows_is_refused(tmp_path: Path) -> None:
    random_set().head(2).save(tmp_path / "set")
    file = tmp_path / "set" / "manifest.json"
    file.write_text(file.read_text().replace('"head_of": 8', '"head_of": 1').replace('"head_of":8', '"head_of":1'))
    with pytest.raises(CalibrantError, match="the first 2 of 1 rows"):
        CalibrationSet.load(tmp_path / "set")


def test_the_inspection_of_a_head_says_of_how_many_rows(tiny: Path, tmp_path: Path) -> None:
    cb.generate(tiny, strategy="vocabulary", samples=6, length=20).head(2).save(tmp_path / "set")
    (found,) = cb.inspect_sets([tmp_path / "set"], model=tiny).sets
    assert found.facts["size"] == "2 rows of 20 tokens, the first of 6"
