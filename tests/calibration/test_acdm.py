"""ACDM takes the texts whose activations are closest to those of target texts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.feed_forward import find_feed_forward
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole

SIZE = {"samples": 6, "length": 24, "windows": "document"}


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _texts(letters: str, count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), rng.integers(30, 90))) for _ in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Texts of three alphabets in turn, one a line."""
    kinds = [_texts(letters, 12, seed) for seed, letters in enumerate(("abcdefg ", "0123456789 ", "QRSTUVW "))]
    return _write(tmp_path / "corpus.jsonl", [text for one in zip(*kinds, strict=True) for text in one])


def _chosen(made: cb.CalibrationSet) -> list[int]:
    """Which lines of the corpus the rows are, from 0."""
    return [int(row[0].document.rsplit(":", 1)[-1]) - 1 for row in made.manifest.rows]


def _means(model, rows: list[list[int]]) -> np.ndarray:
    """Mean outputs of the feed-forward parts in float64, of length 1 per block, ``[rows, blocks, width]``."""
    seen: list[torch.Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.double()[0]))
        for place in find_feed_forward(model)
        for name in place
    ]
    vectors = []
    for row in rows:
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        means = torch.stack([output[-len(row) :].mean(0) for output in seen])
        vectors.append((means / means.norm(dim=1, keepdim=True)).numpy())
    for handle in handles:
        handle.remove()
    return np.stack(vectors)


def test_it_takes_the_closest_to_the_targets(corpus: Path, llama: Path, tmp_path: Path) -> None:
    """Against float64 distances, for one target and for two."""
    tokenizer = Tokenizer(llama)
    model = load_whole(ModelFolder(llama), "cpu", "float32")

    def encoded(texts: list[str]) -> list[list[int]]:
        return [tokenizer.encode(text)[: SIZE["length"]] for text in texts]

    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    vectors = _means(model, encoded(documents))
    like = [_texts(letters, 5, 9)[:5] for letters in ("0123456789 ", "abcdefg ")]
    files = [_write(tmp_path / f"target-{number}.jsonl", texts) for number, texts in enumerate(like)]
    centroids = [_means(model, [tokenizer.encode(text) for text in texts]).mean(0) for texts in like]
    for targets in ([0], [1], [0, 1]):
        apart = np.mean([((vectors - centroids[one]) ** 2).sum(2).mean(1) for one in targets], axis=0)
        made = cb.select(corpus, tokenizer=llama, strategy="acdm", targets=[files[one] for one in targets], **SIZE)
        assert _chosen(made) == [int(index) for index in np.argsort(apart)[: SIZE["samples"]]]
    digits = cb.select(corpus, tokenizer=llama, strategy="acdm", targets=files[:1], **SIZE)
    assert {number % 3 for number in _chosen(digits)} == {1}


def test_smaller_sets_are_the_first_rows(corpus: Path, llama: Path, tmp_path: Path) -> None:
    target = _write(tmp_path / "target.jsonl", _texts("abcdefg ", 5, 9))
    large = cb.select(corpus, tokenizer=llama, strategy="acdm", targets=[target], **SIZE)
    small = cb.select(corpus, tokenizer=llama, strategy="acdm", targets=[target], **{**SIZE, "samples": 2})
    assert torch.equal(small.tokens, large.tokens[:2])


def test_a_set_is_made_again_and_changed_targets_are_named(corpus: Path, llama: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"question": text}) for text in _texts("abcdefg ", 5, 9)]
    target = tmp_path / "target.jsonl"
    target.write_text("\n".join(lines))
    made = cb.select(
        corpus, tokenizer=llama, strategy="acdm", targets=[target], target_field="question", **{**SIZE, "samples": 3}
    )
    made.save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").changes == []
    moved = target.rename(tmp_path / "moved.jsonl")
    with pytest.raises(CalibrantError, match=r"its target .* is not there .*`targets`"):
        cb.rebuild(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set", targets=[moved]).calibration.sha256 == made.sha256
    with pytest.raises(CalibrantError, match="2 targets are given, the set was made with 1"):
        cb.rebuild(tmp_path / "set", targets=[moved, moved])
    moved.write_text("\n".join(json.dumps({"question": text}) for text in _texts("QRSTUVW ", 5, 9)))
    with pytest.raises(CalibrantError, match=r"Changed: the target file"):
        cb.rebuild(tmp_path / "set", targets=[moved])


def test_targets_and_the_strategy_belong_together(corpus: Path, llama: Path) -> None:
    with pytest.raises(CalibrantError, match=r"acdm looks for texts like others: name .* in `targets`"):
        cb.select(corpus, tokenizer=llama, strategy="acdm", **SIZE)
    with pytest.raises(CalibrantError, match="targets is for acdm only, not for zipcal"):
        cb.select(corpus, tokenizer=llama, strategy="zipcal", targets=[corpus], **SIZE)


def test_a_set_of_the_demo_model_is_made_again(corpus: Path, smollm2: Path, tmp_path: Path) -> None:
    """Also where its name is no folder."""
    made = cb.select(corpus, tokenizer="demo", **SIZE)
    made.save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").calibration.sha256 == made.sha256


def test_manifests_of_other_strategies_say_nothing_of_targets(corpus: Path, llama: Path) -> None:
    made = cb.select(corpus, tokenizer=llama, strategy="zipcal", **SIZE)
    assert "targets" not in made.manifest.parameters
    assert "target_field" not in made.manifest.parameters
