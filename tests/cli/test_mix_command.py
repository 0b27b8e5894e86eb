"""``calibrant data mix``."""

import json
from pathlib import Path

import calibrant as cb
from tests.conftest import random_set


def test_the_command_writes_a_mix_and_says_what_does_not_fit(tmp_path: Path, run) -> None:
    folders = [tmp_path / f"set{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        random_set(seed=seed).save(folder)
    mix = ("data", "mix", *folders, "-o", tmp_path / "out", "--weights", "1,3", "--json")
    status, shown, _ = run(*mix, "-n", 8)
    assert status == 0
    assert json.loads(shown)["samples"] == 8
    assert cb.CalibrationSet.load(tmp_path / "out").sha256 == cb.mix_sets(folders, weights=[1, 3], samples=8).sha256
    status, _, said = run(*mix, "-n", 80, "--overwrite")
    assert status == 2
    assert "use --samples 11 or fewer, other --weights, or a larger set" in " ".join(said.split())
