import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

import calibrant as cb
from calibrant.calibration.sources.english import english_beginnings
from calibrant.calibration.sources.self_calibration import TemperatureSchedule
from calibrant.calibration.sources.text_generation import Sampling, _Batch, sample
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.randomness import make_rng


def test_the_schedule_is_linear_then_constant() -> None:
    table = TemperatureSchedule(2.0, 1.0, 10).table(12)
    assert table.tolist() == pytest.approx([1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 1.0, 1.0])
    assert torch.equal(TemperatureSchedule(0.7, 0.7, 10).table(20), TemperatureSchedule(0.7, 0.7, 0).table(20))
    with pytest.raises(CalibrantError):
        TemperatureSchedule(-1.0, 1.0, 0)


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, 4)
    uniform = torch.from_numpy(make_rng(0, "test").random(20000))
    for temperature in (0.5, 1.0, 2.0):
        drawn = sample(logits, torch.full((20000,), temperature, dtype=torch.float64), uniform)
        expected = torch.softmax(logits[0] / temperature, 0).double().numpy()
        observed = np.bincount(drawn.numpy(), minlength=4)
        assert stats.chisquare(observed, expected / expected.sum() * 20000).pvalue > 0.001


def test_greedy_text_is_the_chain_of_most_likely_tokens(llama: Path) -> None:
    made = cb.generate(llama, samples=2, length=20, temperature=TemperatureSchedule(0.0, 0.0, 0), dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    row = made.tokens[0].long()
    start = 0
    for position in range(1, 20):
        if position > start + 1 and row[position - 1] == 2:
            start = position
            assert row[position] == 1
            continue
        with torch.no_grad():
            expected = model(row[None, start:position]).logits[0, -1].argmax()
        assert row[position] == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "bloom", "mixtral"])
def test_text_does_not_depend_on_the_batch(model_folder, architecture: str) -> None:
    sets = [
        cb.generate(model_folder(architecture), samples=5, length=24, batch_size=b, dtype="float32") for b in (1, 2, 5)
    ]
    assert torch.equal(sets[0].tokens, sets[1].tokens)
    assert torch.equal(sets[0].tokens, sets[2].tokens)
    assert sets[0].tokens.shape == (5, 24)
    assert len(np.unique(sets[0].tokens[:, 1:].numpy())) > 20


def test_after_the_end_of_a_text_a_new_one_begins_and_sees_nothing_of_the_old(llama: Path) -> None:
    """Rows with a restart equal what the same draws give to a text that begins there."""
    made = cb.generate(llama, samples=64, length=48, seed=5, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    restarts = 0
    for row_index, row in enumerate(made.tokens.long()):
        uniform = torch.from_numpy(make_rng(5, "self", 0, row_index).random(48))
        for position in range(2, 47):
            if row[position - 1] != 2 or row[position] != 1:
                continue
            restarts += 1
            with torch.no_grad():
                logits = model(row[None, position : position + 1]).logits[:, -1].float()
            following = sample(logits, torch.ones(1, dtype=torch.float64), uniform[position + 1 : position + 2])
            assert row[position + 1] == following
    assert restarts > 5


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_state_alone(llama: Path) -> None:
    before = torch.random.get_rng_state()
    first = cb.generate(llama, samples=3, length=16)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.sha256 == cb.generate(llama, samples=3, length=16).sha256
    assert first.sha256 != cb.generate(llama, samples=3, length=16, draw=1).sha256
    assert first.manifest.model is not None


def test_a_length_beyond_the_context_is_refused(llama: Path) -> None:
    with pytest.raises(CalibrantError, match="context of 64"):
        cb.generate(llama, samples=1, length=65)


def test_the_first_token_is_an_english_beginning(llama: Path) -> None:
    tokenizer = Tokenizer(llama)
    allowed = set(english_beginnings(tokenizer))
    assert allowed
    assert tokenizer.special_ids.isdisjoint(allowed)
    made = cb.generate(llama, samples=40, length=30, first_tokens="english")
    starts = (made.tokens[:, :-1] == 1) & torch.nn.functional.pad(made.tokens[:, :-2] == 2, (1, 0), value=True)
    firsts = made.tokens[:, 1:][starts].tolist()
    assert len(firsts) >= 40
    assert set(firsts) <= allowed
    free = cb.generate(llama, samples=40, length=30)
    assert not set(free.tokens[:, 1].tolist()) <= allowed


def test_llm_qat_starts_from_random_tokens_and_is_greedy_at_first(llama: Path) -> None:
    made = cb.generate(llama, strategy="llm-qat", samples=30, length=12, dtype="float32")
    starts = made.tokens[:, 0].tolist()
    assert len(set(starts)) == 30
    assert not set(starts) & Tokenizer(llama).special_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for position in (1, 2):
            expected = model(made.tokens[:, :position].long()).logits[:, -1].argmax(-1)
            assert torch.equal(made.tokens[:, position].long(), expected)
        logits = model(made.tokens.long()).logits
    ranks = (logits[:, 5:-1] > logits[:, 5:-1].gather(2, made.tokens[:, 6:, None].long())).sum(-1)
    ended = (made.tokens == 2).cumsum(1)[:, 5:-1] > 0
    assert ranks[~ended].max() < 50


def test_prefixes_are_continued_and_the_likeliest_rows_kept(llama: Path, tmp_path: Path) -> None:
    texts = [chr(97 + i % 26) + chr(97 + i // 26) + " text" for i in range(60)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = cb.generate(llama, strategy="prefix", corpus=path, samples=10, length=16, percentile=50)
    assert made.manifest.counts["rows_written"] == 21
    tokenizer = Tokenizer(llama)
    beginnings = {tokenizer.encode(text)[0] for text in texts}
    assert all(row[0] == 1 and row[1].item() in beginnings for row in made.tokens)
    made.save(tmp_path / "set")
    assert cb.rebuild(tmp_path / "set").calibration.sha256 == made.sha256
    with pytest.raises(CalibrantError, match="60 documents"):
        cb.generate(llama, strategy="prefix", corpus=path, samples=100, length=16)
    with pytest.raises(CalibrantError, match="corpus"):
        cb.generate(llama, strategy="prefix", samples=10, length=16)


def test_nucleus_and_penalty_are_those_of_transformers() -> None:
    generator_ = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator_) * 3
    tokens = torch.randint(0, 50, (3, 7), generator=generator_)
    processors = transformers.LogitsProcessorList()
    processors.append(transformers.RepetitionPenaltyLogitsProcessor(1.3))
    processors.append(transformers.TemperatureLogitsWarper(0.6))
    processors.append(transformers.TopKLogitsWarper(20))
    processors.append(transformers.TopPLogitsWarper(0.8))
    expected = torch.softmax(processors(tokens, logits.clone()), -1)
    rule = Sampling(torch.full((8,), 0.6, dtype=torch.float64), None, 20, 0.8, 1.3)
    batch = _Batch(torch.zeros(3, 8, dtype=torch.float64), 0, lambda row, text: [0], rule, torch.tensor([-1]))
    batch.tokens[:, :7] = tokens
    batch.position[:] = 6
    found = torch.softmax(batch._adjusted(logits, 7, torch.full((3,), 0.6, dtype=torch.float64)) / 0.6, -1)
    torch.testing.assert_close(found, expected)
