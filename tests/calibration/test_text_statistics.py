"""Statistics of sets against closed forms and plain counting, odd rows, and the page in a real browser."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.text_statistics import (
    RowNumbers,
    describe_set,
    ngram_diversity,
    odd_rows,
    overlap,
    zipf_exponent,
    zipf_likelihood,
)
from calibrant.report.inspection import inspect_sets
from tests.browser import needs_browser, seen
from tests.conftest import random_set


def test_uniform_tokens_have_the_closed_forms() -> None:
    """Coverage, repetition and token diversity of uniform draws (arXiv 2410.17170)."""
    eligible, vocabulary, rows, length = 500, 520, 40, 200
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, eligible, (rows, length)))
    made = CalibrationSet.build(tokens, torch.ones_like(tokens, dtype=torch.bool), random_set().manifest)
    numbers = describe_set(made, ["x"] * rows, vocabulary, None).numbers
    drawn = rows * length
    assert numbers["coverage"] == pytest.approx(eligible / vocabulary * (1 - (1 - 1 / eligible) ** drawn), abs=0.005)
    repetition = 1 - eligible * (1 - (1 - 1 / eligible) ** length) / length
    assert numbers["repetition"] == pytest.approx(repetition, abs=0.01)
    diversity = (eligible * (1 - (1 - 1 / eligible) ** drawn) / drawn + 3) / 4
    assert numbers["div_token"] == pytest.approx(diversity, abs=0.02)
    assert numbers["perplexity"] is None


def test_masked_tokens_count_for_nothing() -> None:
    tokens = torch.tensor([[1, 2, 3, 9, 9, 9], [1, 2, 4, 5, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    made = CalibrationSet.build(tokens, mask, random_set().manifest)
    found = describe_set(made, ["a b a", "b c"], 10, [math.log(2), math.log(4)])
    numbers = found.numbers
    assert numbers["tokens"] == 7
    assert numbers["distinct_tokens"] == 5
    assert numbers["coverage"] == 0.5
    assert numbers["repetition"] == 0
    assert numbers["perplexity"] == pytest.approx(3)
    assert numbers["distinct_words"] == 3
    assert found.coverage_growth.tolist() == [3, 5]
    assert found.token_frequencies.tolist() == [2, 2, 1, 1, 1]


def test_diversity_counts_inside_rows_only() -> None:
    assert ngram_diversity([[1, 1, 1, 1, 1]]) == pytest.approx(np.mean([1 / 5, 1 / 4, 1 / 3, 1 / 2]))
    assert ngram_diversity([[1, 2], [3, 4]]) == 1
    assert ngram_diversity([[]]) is None


def test_zipf_exponents_are_found() -> None:
    exact = Counter({rank: 1e6 * rank**-1.2 for rank in range(1, 300)})
    assert zipf_exponent(exact) == pytest.approx(1.2)
    assert zipf_likelihood(exact) == pytest.approx(1.2, abs=1e-3)
    assert zipf_exponent(Counter({"a": 3})) is None


def test_the_odd_row_is_found_and_says_why() -> None:
    rng = np.random.default_rng(0)
    rows = [RowNumbers(100, 0.3 + 0.02 * rng.random(), 0.1 + 0.01 * rng.random(), 20 + rng.random()) for _ in range(50)]
    assert odd_rows(rows) == []
    rows[7] = RowNumbers(100, 0.95, 0.105, 2.0)
    odd = odd_rows(rows)
    assert [row.row for row in odd] == [7]
    assert len(odd[0].reasons) == 2
    assert "repetition 0.95" in odd[0].reasons[0]


def test_overlap_of_sets() -> None:
    left, right = random_set(samples=4, seed=0), random_set(samples=4, seed=1)
    assert overlap(left, left)["equal_rows"] == 4
    assert overlap(left, left)["distinct_tokens"] == 1
    assert overlap(left, right)["equal_rows"] == 0


@pytest.fixture
def sets(tmp_path: Path, llama: Path) -> list[Path]:
    text = tmp_path / "c.txt"
    text.write_text("It was the best of times, it was the worst of times <script>alert(1)</script> & more. " * 60)
    folders = [tmp_path / "words", tmp_path / "noise & <b>"]
    cb.select(text, tokenizer=llama, samples=8, length=48).save(folders[0])
    cb.generate(llama, strategy="vocabulary", samples=8, length=48).save(folders[1])
    return folders


def test_inspection_compares_sets(sets: list[Path], llama: Path) -> None:
    found = inspect_sets(sets, perplexity=True, dtype="float32")
    words, noise = (one.statistics.numbers for one in found.sets)
    assert words["coverage"] < noise["coverage"]
    assert words["perplexity"] > 1
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["overlaps"][0]["equal_rows"] == 0
    with pytest.raises(cb.CalibrantError, match="no such folder"):
        inspect_sets(sets, model="nowhere")


def test_the_page_shows_what_was_asked_for(sets: list[Path], llama: Path, tmp_path: Path) -> None:
    filters = cb.FilterRequest(duplicates="near", min_characters=3)
    cb.select(tmp_path / "c.txt", tokenizer=llama, samples=4, length=48, filters=filters).save(tmp_path / "filtered")
    found = inspect_sets([sets[0], tmp_path / "filtered"]).sets
    assert "parameters" not in found[0].facts
    assert found[1].facts["parameters"] == "filters: duplicates near; min characters 3"


def test_the_page_needs_nothing_else(sets: list[Path]) -> None:
    page = inspect_sets(sets).page()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:,)|@import|url\((?!#)""", page)
    assert "<script>alert" not in page
    assert "noise &amp; &lt;b&gt;" in page


@needs_browser
def test_the_page_in_a_real_browser(sets: list[Path], tmp_path: Path) -> None:
    """It renders: every chart has an area on the screen, the tables have the sets' columns, no text is executed."""
    page = inspect_sets(sets, perplexity=True, dtype="float32").page()
    probe = """
      const box = (e) => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
      return {
        charts: [...document.querySelectorAll("figure svg")].map(box),
        columns: document.querySelectorAll("#numbers + .scroll table thead th").length,
        wide: document.documentElement.scrollWidth > window.innerWidth,
        rows: document.querySelectorAll("details.sample").length,
        images: [...document.images].length };
    """
    for width in (1280, 390):
        found, console = seen(page, probe, width, tmp_path)
        assert console == []
        assert len(found["charts"]) == 4
        assert all(w > 200 and h > 100 for w, h in found["charts"])
        assert found["columns"] == 3
        assert not found["wide"]
        assert found["rows"] == 10
