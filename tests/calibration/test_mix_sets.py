"""Mixes of calibration sets: shares, turns, nested mixes, what the manifest says, and sets that do not fit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from tests.conftest import random_set


def owners(mixed: CalibrationSet, *sets: CalibrationSet) -> list[int]:
    """Which of ``sets`` every row is from."""
    known = {(*row.tolist(),): index for index, one in enumerate(sets) for row in one.tokens}
    return [known[(*row.tolist(),)] for row in mixed.tokens]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any), st.integers(1, 40))
def test_every_beginning_of_a_mix_has_its_shares(weights: list[int], samples: int) -> None:
    sets = [random_set(samples=40, seed=seed) for seed in range(len(weights))]
    found = owners(cb.mix_sets(sets, weights=weights, samples=samples), *sets)
    for rows in range(1, samples + 1):
        for index, weight in enumerate(weights):
            assert abs(found[:rows].count(index) - rows * weight / sum(weights)) < 1.5
            assert weight or not found.count(index)


@pytest.mark.parametrize("seed", [None, 3])
def test_smaller_mixes_are_the_first_rows_of_larger_ones(seed: int | None) -> None:
    sets = [random_set(samples=8, seed=0, masked=2), random_set(samples=20, seed=1)]
    small, large = (cb.mix_sets(sets, samples=samples, weights=[1, 2], seed=seed) for samples in (5, 20))
    assert torch.equal(small.tokens, large.tokens[:5])
    assert torch.equal(small.mask, large.mask[:5])
    assert large.sha256 == cb.mix_sets(sets, samples=20, weights=[1, 2], seed=seed).sha256
    in_order = [row.tolist() for row, owner in zip(large.tokens, owners(large, *sets), strict=True) if owner == 1]
    assert (in_order == sets[1].tokens[: len(in_order)].tolist()) == (seed is None)


def test_a_mix_takes_all_rows_that_keep_its_shares() -> None:
    mixed = cb.mix_sets([random_set(samples=6, seed=0), random_set(samples=9, seed=1)])
    assert mixed.tokens.shape[0] in (12, 13)
    with pytest.raises(
        CalibrantError, match=r"set 1: its 6 rows are used up after 1[23] rows of the mix, 15 are wanted"
    ):
        cb.mix_sets([random_set(samples=6, seed=0), random_set(samples=9, seed=1)], samples=15)


def test_the_manifest_names_the_sets(llama: Path, tmp_path: Path) -> None:
    web = cb.select(
        cb.Corpus([f"some text number {n} here. " * 5 for n in range(9)]), tokenizer=llama, samples=4, length=20
    )
    own = cb.generate(llama, strategy="vocabulary", samples=4, length=20)
    web.save(tmp_path / "web")
    own.save(tmp_path / "own")
    mixed = cb.mix_sets([tmp_path / "web", tmp_path / "own"], weights=[3, 1], samples=4)
    first, second = mixed.manifest.parameters["sets"]
    assert (first["manifest"]["set_sha256"], first["share"], first["rows"]) == (web.sha256, 0.75, 3)
    assert (second["manifest"]["set_sha256"], second["manifest"]["strategy"]) == (own.sha256, "vocabulary")
    assert [one.document.split("/")[0] for row in mixed.manifest.rows for one in row if row] == ["0"] * sum(
        len(row) for row in mixed.manifest.rows
    )
    mixed.save(tmp_path / "mixed")
    assert CalibrationSet.load(tmp_path / "mixed").manifest == mixed.manifest
    assert mixed.head(2).manifest.head_of == 4
    with pytest.raises(CalibrantError, match="is a mix of others"):
        cb.rebuild(tmp_path / "mixed")
    (inspected,) = cb.inspect_sets([tmp_path / "mixed"], model=llama).sets
    assert inspected.facts["size"] == "4 rows of 20 tokens"


def test_sets_that_do_not_fit(llama: Path) -> None:
    one = random_set()
    for others, options, said in (
        ([], {}, "at least two sets"),
        ([random_set()], {}, "set 2: is the same set as set 1"),
        ([random_set(length=16)], {}, "set 2: has rows of 16 tokens, set 1 of 32"),
        ([random_set(llama, seed=1)], {}, "set 2: was made with another tokenizer"),
        ([random_set(seed=1)], {"weights": [1]}, "1 weights for 2 sets"),
        ([random_set(seed=1)], {"weights": [1, -1]}, "not negative"),
        ([random_set(seed=1)], {"samples": 0}, "at least 1"),
    ):
        with pytest.raises(CalibrantError, match=said):
            cb.mix_sets([one, *others], **options)
