"""Decoding step by step gives the logits of a forward pass over the whole row, on every path."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from calibrant.calibration.sources.text_generation import sample
from calibrant.kernels import bfloat16_tile, float32_tile
from calibrant.modeling.decoding import FastDecoder, PlainDecoder, prepare_decoding
from calibrant.randomness import make_rng
from tests.conftest import ARCHITECTURES

FAST = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi",
    "gpt2",
    "opt",
    "gpt_neox",
    "qwen3_moe",
    "olmo2",
    "mixtral",
}
CAUSAL = [name for name in ARCHITECTURES if not name.startswith("bert")]
needs_bfloat16_tile = pytest.mark.skipif(not bfloat16_tile.available(), reason="this processor has no AVX512-BF16")
needs_float32_tile = pytest.mark.skipif(not float32_tile.available(), reason="this processor has no AVX2")
fast_dtypes = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=needs_bfloat16_tile), pytest.param(torch.float32, marks=needs_float32_tile)],
)
ROWS, STEPS = 4, 40


def model_of(architecture: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[architecture]().to(dtype).eval().requires_grad_(False)


def steps(decoder, tokens: torch.Tensor, restarts: dict[int, int]) -> torch.Tensor:
    """Logits of every step; row ``r`` restarts at step ``restarts[r]``."""
    positions = torch.zeros(len(tokens), dtype=torch.long)
    logits = []
    for step in range(tokens.shape[1]):
        for row, begin in restarts.items():
            if begin == step:
                positions[row] = 0
        logits.append(decoder.step(tokens[:, step], positions))
        positions = positions + 1
    return torch.stack(logits, 1)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", CAUSAL)
@fast_dtypes
def test_every_step_gives_what_a_whole_forward_gives(architecture: str, dtype: torch.dtype) -> None:
    """Rows restart at different steps; the sliding window of Gemma 3 is shorter than the text."""
    tokens = torch.randint(4, 100, (ROWS, STEPS), generator=torch.Generator().manual_seed(0))
    restarts = {1: 7, 3: 22}
    model = model_of(architecture, dtype)
    expected = model_of(architecture, torch.float32)
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-4
    make = prepare_decoding(model)
    assert isinstance(make(1, 2), FastDecoder if architecture in FAST else PlainDecoder)
    found = steps(make(ROWS, STEPS), tokens, restarts)
    for row in range(ROWS):
        begins = [0, restarts[row], STEPS] if row in restarts else [0, STEPS]
        for begin, end in pairwise(begins):
            whole = expected(tokens[row : row + 1, begin:end]).logits[0]
            difference = (found[row, begin:end] - whole).abs().mean()
            assert difference < tolerance * whole.std()


@torch.inference_mode()
@fast_dtypes
def test_a_model_can_be_prepared_twice(dtype: torch.dtype) -> None:
    model = model_of("llama", dtype)
    tokens = torch.randint(4, 100, (3, 5), generator=torch.Generator().manual_seed(0))
    first, second = (steps(prepare_decoding(model)(3, 5), tokens, {}) for _ in range(2))
    assert torch.equal(first, second)


@torch.inference_mode()
def test_models_of_other_dtypes_run_as_they_are() -> None:
    assert isinstance(prepare_decoding(model_of("llama", torch.float64))(1, 2), PlainDecoder)


@torch.inference_mode()
@fast_dtypes
def test_a_model_that_the_fast_path_does_not_fit_is_left_as_it_was(dtype: torch.dtype) -> None:
    model = model_of("gemma2", dtype)
    tokens = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    before, tied = model(tokens).logits, model.lm_head.weight is model.model.embed_tokens.weight
    prepare_decoding(model)
    assert torch.equal(model(tokens).logits, before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@torch.inference_mode()
@fast_dtypes
def test_a_weight_is_in_memory_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, step, alive = model_of("llama", dtype), FastDecoder.step, []
    weights = [weakref.ref(parameter) for name, parameter in model.named_parameters() if "proj" in name]

    def noted(self: FastDecoder, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        alive.append(sum(weight() is not None for weight in weights))
        return step(self, tokens, positions)

    monkeypatch.setattr(FastDecoder, "step", noted)
    prepare_decoding(model)
    assert alive
    assert not any(alive)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampled_tokens_follow_the_models_distribution(dtype: torch.dtype) -> None:
    """Chi-square test of thousands of short texts against as many from plain forward passes and torch.multinomial."""
    rows, length = 4000, 4
    plain = model_of("llama", dtype)
    reference = torch.ones(rows, 1, dtype=torch.long)
    for _ in range(length):
        chances = torch.softmax(plain(reference).logits[:, -1].float() * 3, -1)
        drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(len(reference[0])))
        reference = torch.cat([reference, drawn], 1)
    decoder = prepare_decoding(model_of("llama", dtype))(rows, length + 1)
    uniforms = torch.from_numpy(make_rng(1, "test").random((rows, length)))
    tokens = torch.ones(rows, dtype=torch.long)
    for column in range(length):
        logits = decoder.step(tokens, torch.full((rows,), column))
        tokens = sample(logits, torch.full((rows,), 1 / 3, dtype=torch.float64), uniforms[:, column])
        counts = [np.bincount(sample, minlength=128) for sample in (tokens.numpy(), reference[:, column + 1].numpy())]
        table = np.array(counts)[:, np.sum(counts, axis=0) >= 10]
        assert stats.chi2_contingency(table).pvalue > 0.001
