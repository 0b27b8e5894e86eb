"""The feed-forward part of a block is found by what it computes, whatever its name, and attention never is it."""

import numpy as np
import pytest
import torch
import transformers as hf

from calibrant.calibration.selection.activations import FeedForwardMeans
from calibrant.calibration.windows import Window
from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.feed_forward import find_feed_forward
from calibrant.modeling.whole_model import load_whole

EXPECTED = {
    "llama": "model.layers.0.mlp",
    "gemma2": "model.layers.0.mlp",
    "phi": "model.layers.0.mlp",
    "falcon": "transformer.h.0.mlp",
    "gpt2": "transformer.h.0.mlp",
    "opt": "model.decoder.layers.0.fc2",
    "bloom": "transformer.h.0.mlp.dense_4h_to_h",
    "mixtral": "model.layers.0.mlp",
    "qwen3_moe": "model.layers.0.mlp",
    "bert_mlm": "bert.encoder.layer.0.output.dense",
}


@pytest.mark.parametrize("architecture", EXPECTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_feed_forward_parts_of_all_kinds_of_blocks(model_folder, architecture: str, dtype: str) -> None:
    model = load_whole(ModelFolder(model_folder(architecture), allow_encoder=True), "cpu", dtype)
    first = EXPECTED[architecture]
    assert find_feed_forward(model) == [(first,), (first.replace(".0.", ".1."),)]


def _random(kind, config) -> hf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def test_two_feed_forward_parts_side_by_side_are_both_found() -> None:
    config = hf.GraniteMoeSharedConfig(**SIZE, num_key_value_heads=2, intermediate_size=32, shared_intermediate_size=32)
    model = _random(hf.GraniteMoeSharedForCausalLM, config)
    assert find_feed_forward(model)[1] == ("model.layers.1.block_sparse_moe", "model.layers.1.shared_mlp")


def test_a_model_without_a_feed_forward_part_is_refused() -> None:
    model = _random(hf.MambaForCausalLM, hf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128))
    with pytest.raises(CalibrantError, match="MambaForCausalLM: its blocks have no feed-forward part"):
        find_feed_forward(model)


@pytest.mark.parametrize("prefix", [[], [1]])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_means_do_not_depend_on_what_runs_together(model_folder, architecture: str, prefix: list[int]) -> None:
    """Windows of several lengths, in batches and one by one, against plain hooks."""
    model = load_whole(ModelFolder(model_folder(architecture)), "cpu", "float32")
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 90, (length,), generator=draw).tolist() for length in (20, 5, 20, 33, 5, 20)]
    windows = [Window(row, [], 0, 0, 0) for row in rows]
    means = FeedForwardMeans(model, prefix)
    together = means.of(windows)
    assert together.shape == (6, 2 * 64)
    np.testing.assert_allclose(together, np.concatenate([means.of([one]) for one in windows]), rtol=1e-4, atol=1e-6)
    seen = []
    for (name,) in find_feed_forward(model):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([prefix + rows[3]]))
    outputs = [one[0] if isinstance(one, tuple) else one for one in seen]
    expected = [one.reshape(-1, 64)[len(prefix) :].mean(0) for one in outputs]
    expected = torch.cat([one / one.norm() for one in expected]).numpy()
    np.testing.assert_allclose(together[3], expected, rtol=1e-4, atol=1e-6)
