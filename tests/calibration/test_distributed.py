"""Two rounds over parts, here and on a real Ray cluster of several workers: one result, nearly greedy's coverage."""

import json
from pathlib import Path

import numpy as np
import pytest

import calibrant as cb

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz0123456789 "), rng.integers(5, 90))) for _ in range(300)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_the_cluster_gives_what_one_process_gives(corpus: Path, llama: Path, tmp_path: Path, cluster) -> None:
    common = {"tokenizer": llama, "strategy": "zipcal", "samples": 4, "length": 24}
    here = cb.select(corpus, parts=3, **common)
    there = cb.select(corpus, executor="ray", **common)
    assert there.manifest.parameters["parts"] == 3
    here.save(tmp_path / "here")
    there.save(tmp_path / "there")
    assert (tmp_path / "here/manifest.json").read_bytes() == (tmp_path / "there/manifest.json").read_bytes()
    assert here.sha256 == there.sha256
    assert cb.rebuild(tmp_path / "there").calibration.sha256 == there.sha256


def test_errors_of_workers_reach_the_user(tmp_path: Path, llama: Path, cluster) -> None:
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(cb.CalibrantError, match="line 1: not JSON"):
        cb.select(tmp_path / "bad.jsonl", tokenizer=llama, strategy="zipcal", executor="ray", samples=2, length=8)


@pytest.mark.parametrize("parts", [2, 7])
def test_parts_cover_nearly_what_one_pass_covers(corpus: Path, llama: Path, parts: int) -> None:
    common = {"tokenizer": llama, "strategy": "zipcal", "samples": 5, "length": 20}
    whole = cb.select(corpus, **common).manifest.counts
    split = cb.select(corpus, parts=parts, **common).manifest.counts
    assert split["classes_covered"] >= (1 - 1 / np.e) / 2 * whole["classes_covered"]
    assert split["classes_covered"] >= 0.9 * whole["classes_covered"]
    assert split["documents"] == whole["documents"] == 300


def test_what_parts_do_not_go_with(corpus: Path, llama: Path) -> None:
    with pytest.raises(cb.CalibrantError, match="parts is for zipcal"):
        cb.select(corpus, tokenizer=llama, parts=2, samples=2, length=8)
    with pytest.raises(cb.CalibrantError, match="windows of 24 tokens"):
        cb.select(corpus, tokenizer=llama, strategy="zipcal", parts=2, samples=5000, length=24)
