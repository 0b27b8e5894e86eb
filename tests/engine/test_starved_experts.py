"""Experts that no calibration token reaches: what each strategy does for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrant as cb
from calibrant.engine.expert_counts import expert_counts, rows_that_reach
from calibrant.errors import CalibrantError
from calibrant.modeling import entry
from calibrant.progress import NoProgress
from tests.conftest import CONTEXT, VOCABULARY, random_set, write_tokenizer

EXPERTS, BLOCKS, WIDTH = 4, 2, 64


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts 2 and 3 of both blocks have a logit of 0, where 0 and 1 have one above and one below."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    config = hf.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, num_local_experts=EXPERTS,
        num_experts_per_tok=1, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.shape == (EXPERTS, WIDTH):
            assert "gate" in name
            parameter.data[1], parameter.data[2:] = -parameter.data[0], 0
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def recipe(experts: dict[str, Any] | None = None, method: str = "gptq") -> cb.Recipe:
    scheme = {"weights": {"bits": 3, "group_size": 32}}
    said = {"name": "r", "description": "d", "method": {"name": method}, "scheme": scheme, "experts": experts}
    return cb.Recipe.model_validate(said)


def compressed(mixture: Path, output: Path, experts: dict[str, Any] | None, **options: Any) -> cb.RunReport:
    said = {"calibration": random_set(mixture), "dtype": "float32", **options}
    return cb.compress(mixture, output=output, recipe=recipe(experts), **said)


def of_expert(report: cb.RunReport, expert: int) -> list[cb.LayerReport]:
    return [layer for layer in report.layers if ".experts." in layer.name and layer.name.endswith(f".{expert}")]


def outputs_of_all(mixture: Path, changed: Path, expert: int) -> float:
    """Squared change of the outputs of ``expert`` in block 0, with every token of the set sent to it."""
    seen: list[torch.Tensor] = []
    original = hf.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    block = original.model.layers[0].mlp
    hook = block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = random_set(mixture).tokens.long()
    with torch.no_grad():
        original(tokens)
        hook.remove()
        dense = decoded(changed)
        choices = torch.full((len(seen[0]), 1), expert)
        before = block.experts(seen[0], choices, torch.ones(len(seen[0]), 1))
        block.experts.load_state_dict(
            {name: dense[f"model.layers.0.mlp.experts.{name}"] for name in block.experts.state_dict()}
        )
        after = block.experts(seen[0], choices, torch.ones(len(seen[0]), 1))
    return float((after - before).square().sum())


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Decoded weights of an output, by parameter."""
    from calibrant.modeling.checkpoint import ModelFolder
    from calibrant.modeling.lazy_model import LazyModel

    lazy = LazyModel(ModelFolder(folder, dequantize=True), torch.float32, torch.device("cpu"))
    found = {}
    for index in range(BLOCKS):
        with lazy.loaded(f"model.layers.{index}") as module:
            found |= {f"model.layers.{index}.{name}": value.clone() for name, value in module.state_dict().items()}
    return found


def test_as_routed_they_are_solved_without_data_and_named(mixture: Path, tmp_path: Path) -> None:
    report = compressed(mixture, tmp_path / "out", None)
    assert [layer.tokens for layer in of_expert(report, 2)] == [0] * 2 * BLOCKS
    assert all("without data" in str(layer.record.fallback) for layer in of_expert(report, 3))
    assert any(
        note == "4 of 8 experts were reached by no token: model.layers.0.mlp.experts.2 and 3 more experts"
        for note in report.notes
    )
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(random_set(mixture).tokens.long()).logits.isfinite().all()


@pytest.mark.parametrize("order", ["sequential", "two-pass", "independent"])
def test_all_tokens_calibrate_them_and_leave_the_others(mixture: Path, tmp_path: Path, order: str) -> None:
    routed = compressed(mixture, tmp_path / "routed", None, order=order)
    filled = compressed(mixture, tmp_path / "filled", {"starved": "all-tokens", "least_tokens": 1}, order=order)
    tokens = random_set(mixture).tokens.numel()
    for expert in (2, 3):
        assert [(layer.tokens, layer.routed) for layer in of_expert(filled, expert)] == [(tokens, 0)] * 2 * BLOCKS
        assert all(layer.record.fallback is None for layer in of_expert(filled, expert))
        better, worse = (outputs_of_all(mixture, tmp_path / name, expert) for name in ("filled", "routed"))
        assert better < 0.8 * worse
    for expert in (0, 1):  # no token of the routed output has passed a starved expert
        assert of_expert(filled, expert) == of_expert(routed, expert)
    assert any(note.startswith("4 of 8 experts were reached by no token") for note in filled.notes)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "filled")
    assert model(random_set(mixture).tokens.long()).logits.isfinite().all()


def test_the_least_number_of_tokens_decides(mixture: Path, tmp_path: Path) -> None:
    report = compressed(mixture, tmp_path / "out", {"starved": "all-tokens", "least_tokens": 10_000})
    tokens = random_set(mixture).tokens.numel()
    assert all(layer.tokens == tokens for expert in range(EXPERTS) for layer in of_expert(report, expert))
    routed = [layer.routed for expert in range(EXPERTS) for layer in of_expert(report, expert)[:1]]
    assert sum(routed) == tokens
    assert 0 < routed[0] < tokens
    assert any(note.startswith("8 of 8 experts were reached by fewer than 10000 tokens") for note in report.notes)


def test_little_memory_changes_nothing(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "MICRO_BATCH_TOKENS", 64)
    asked = {"starved": "all-tokens", "least_tokens": 1}
    compressed(mixture, tmp_path / "roomy", asked, memory="64GB")
    compressed(mixture, tmp_path / "tight", asked, memory="1MB")
    for file in ("model.safetensors", "calibrant.json"):
        assert (tmp_path / "tight" / file).read_bytes() == (tmp_path / "roomy" / file).read_bytes()


def _counts(mixture: Path, rows: cb.CalibrationSet) -> torch.Tensor:
    prepared = cb.prepare(mixture, output=mixture.with_name("none"), recipe=recipe(), calibration=rows)
    return expert_counts(prepared.model, prepared.plan.blocks, rows.rows, torch.float32, None, NoProgress())


def test_tokens_are_counted_by_row_and_expert(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "MICRO_BATCH_TOKENS", 64)
    rows = random_set(mixture, masked=5)
    mask = rows.mask.clone()
    mask[2, 20:] = False  # another length, so that rows are batched in another order
    ragged = cb.CalibrationSet.build(rows.tokens, mask, rows.manifest)
    counts = _counts(mixture, ragged)
    assert counts.shape == (8, BLOCKS * EXPERTS)
    assert torch.equal(counts.view(8, BLOCKS, EXPERTS).sum(2), mask.sum(1)[:, None].expand(-1, BLOCKS))
    one = rows.manifest.model_copy(update={"samples": 1})
    sets = [cb.CalibrationSet.build(rows.tokens[i : i + 1], mask[i : i + 1], one) for i in range(8)]
    alone = [_counts(mixture, row) for row in sets]
    assert torch.equal(counts, torch.cat(alone))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 12), st.integers(1, 6), st.integers(0, 12))
def test_rows_are_chosen_while_they_bring_what_is_missing(seed: int, rows: int, experts: int, most: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (rows, experts), generator=generator)
    have = torch.randint(0, 8, (experts,), generator=generator)
    chosen = rows_that_reach(counts, have, 6, most)
    assert len(set(chosen)) == len(chosen) <= min(most, rows)
    missing = (6 - have).clamp(min=0)
    gains = torch.minimum(counts, missing).sum(1)
    if chosen:
        assert gains[chosen[0]] == gains.max()
    left = (6 - have - counts[chosen].sum(0)).clamp(min=0)
    if len(chosen) < min(most, rows):  # no other row would have helped
        others = [row for row in range(rows) if row not in chosen]
        assert int(torch.minimum(counts[others], left).sum()) == 0


@pytest.fixture(scope="module")
def picky(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Expert 2 of block 0 is reached by tokens like token 40 alone."""
    folder = tmp_path_factory.mktemp("picky") / "model"
    model = hf.MixtralForCausalLM.from_pretrained(mixture)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        state = model.model.layers[0].post_attention_layernorm(embedding[40])
        model.model.layers[0].mlp.gate.weight[2] = 0.3 * state
        model.model.layers[0].mlp.gate.weight[:2] *= 0.1
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_rows_that_the_model_writes_reach_them(picky: Path, tmp_path: Path) -> None:
    rows = random_set(picky)
    tokens = torch.where(rows.tokens == 40, 41, rows.tokens)
    without = cb.CalibrationSet.build(tokens, rows.mask, rows.manifest)
    before = _counts(picky, without).sum(0)
    asked = {"starved": "more-rows", "least_tokens": int(before[2]) + 6}
    report = compressed(picky, tmp_path / "out", asked, calibration=without)
    used = cb.CalibrationSet.load(tmp_path / "out" / "calibration")
    assert torch.equal(used.tokens[:8], without.tokens)
    assert 8 < len(used.tokens) <= 16
    assert used.manifest.strategy == "experts"
    assert used.manifest.parameters["lacking_before"] >= used.manifest.parameters["lacking_after"]
    after = _counts(picky, used).sum(0)
    assert after[2] > before[2]
    gate = next(layer for layer in report.layers if layer.name == "model.layers.0.mlp.experts.gate_up_proj.2")
    assert gate.tokens == after[2]
    again = compressed(picky, tmp_path / "again", asked, calibration=without)
    assert again.layers == report.layers


def test_a_model_without_experts_is_refused(llama: Path, tmp_path: Path) -> None:
    asked = recipe({"starved": "more-rows", "least_tokens": 1})
    with pytest.raises(CalibrantError, match="has no fused experts; leave `experts` out of the recipe"):
        cb.compress(llama, output=tmp_path / "out", recipe=asked, calibration=random_set(llama))


def test_methods_without_statistics_refuse_it() -> None:
    with pytest.raises(ValueError, match="gathers none: leave it out"):
        recipe({"starved": "all-tokens"}, "rtn")
