"""Models on CPUs give the same results with our parts of blocks as with transformers'."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from calibrant.kernels import bfloat16_tile
from calibrant.kernels.lookup import every_number
from calibrant.modeling import activations, attention, linears, norms
from calibrant.modeling.kernel_forward import has_kernel
from tests.conftest import ARCHITECTURES

CPU = torch.device("cpu")
needs_bfloat16_tile = pytest.mark.skipif(not bfloat16_tile.available(), reason="this processor has no AVX512-BF16")


@pytest.fixture(params=["llama", "qwen3", "gemma2", "gemma3", "olmo2", "gpt2", "mixtral"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[request.param]().bfloat16().eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 100, (2, 33), generator=torch.Generator().manual_seed(0))


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[int]:
    """A list that grows by one element per call of ``owner.name``."""
    calls: list[int] = []
    original = vars(owner)[name]
    monkeypatch.setattr(owner, name, lambda *args: (calls.append(1), original(*args))[1])
    return calls


@needs_bfloat16_tile
@torch.inference_mode()
def test_models_run_on_our_attention(model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, attention, "causal_attention")
    expected = model(tokens).logits
    softcapped = model.config._attn_implementation != "sdpa"  # Gemma 2
    attention.use_fast_attention(model, torch.bfloat16, CPU)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0.05, atol=0.05)
    assert len(calls) == (0 if softcapped else 2)


@torch.inference_mode()
def test_norms_are_known_by_what_they_compute(model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms add 1 to their weights and OLMo's round once; GPT-2's subtract the mean and are not replaced."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter))
    expected = model(tokens).logits
    norms.use_fast_norms(model, torch.bfloat16, CPU)
    calls = counted(monkeypatch, norms, "rms_norm")
    assert torch.equal(model(tokens).logits, expected)
    blocks = {"llama": 2 * 2 + 1, "mixtral": 2 * 2 + 1, "qwen3": 2 * 4 + 1, "olmo2": 2 * 4 + 1}
    blocks |= {"gemma2": 2 * 4 + 1, "gemma3_text": 2 * 6 + 1}
    assert len(calls) == blocks.get(model.config.model_type, 0)


@torch.inference_mode()
def test_a_gate_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of Mamba 2 take a gate; without one they are plain norms."""
    gated = Zamba2RMSNormGated(64, 64, eps=1e-5).bfloat16()
    gated.weight.data.add_(torch.randn(64))
    inputs, gate = torch.randn(2, 1, 8, 64).bfloat16()
    expected = gated(inputs, gate), gated(inputs, gate=gate), gated(inputs, None)
    norms.use_fast_norms(gated, torch.bfloat16, CPU)
    found = gated(inputs, gate), gated(inputs, gate=gate), gated(inputs, None)
    assert all(map(torch.equal, found, expected))
    calls = counted(monkeypatch, norms, "rms_norm")
    torch.testing.assert_close(gated(inputs), expected[2], rtol=0.02, atol=0.02)
    assert len(calls) <= 1


@torch.inference_mode()
def test_inputs_of_another_dtype_are_normed_by_the_module_itself() -> None:
    """Some models add in float32 before a norm."""
    norm = LlamaRMSNorm(64, eps=1e-5).bfloat16()
    inputs = torch.randn(2, 8, 64)
    expected = norm(inputs)
    norms.use_fast_norms(norm, torch.bfloat16, CPU)
    assert has_kernel(norm)
    assert torch.equal(norm(inputs), expected)


@torch.inference_mode()
def test_an_epsilon_is_not_guessed() -> None:
    """A module whose epsilon is not an attribute keeps its forward."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.ones(8)), 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    module = Hidden()
    norms.use_fast_norms(module, torch.bfloat16, CPU)
    assert not has_kernel(module)


@torch.inference_mode()
def test_activations_are_the_same_bit_for_bit(model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model(tokens).logits
    activations.use_fast_activations(model, torch.bfloat16, CPU)
    calls = counted(monkeypatch, activations, "look_up")
    assert torch.equal(model(tokens).logits, expected)
    assert len(calls) >= 2  # one per block; more for Mixtral, whose experts share a module


@pytest.mark.parametrize("module", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.Hardtanh(), nn.LeakyReLU(0.1)])
@torch.inference_mode()
def test_a_table_covers_every_number(module: nn.Module) -> None:
    numbers = every_number()
    expected = module(numbers).clone()
    activations.use_fast_activations(module, torch.bfloat16, CPU)
    assert has_kernel(module)
    torch.testing.assert_close(module(numbers), expected, rtol=0, atol=0, equal_nan=True)
    crossed = numbers.view(256, 256).t()
    torch.testing.assert_close(module(crossed), expected.view(256, 256).t(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(module(torch.ones(3)), type(module).forward(module, torch.ones(3)))  # another dtype


class _Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)


class _Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class _Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y


@pytest.mark.parametrize(
    "module", [nn.Softmax(-1), _Centred(), _Noisy(), _Two(), nn.Flatten(0), nn.PReLU(), nn.GLU(), nn.ReLU()]
)
def test_other_modules_are_no_tables(module: nn.Module) -> None:
    activations.use_fast_activations(module, torch.bfloat16, CPU)
    assert not has_kernel(module)


@needs_bfloat16_tile
@torch.inference_mode()
def test_masks_of_another_kind_stay_with_sdpa(model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = torch.ones_like(tokens)
    padded[1, :9] = 0
    expected = model(tokens, attention_mask=padded).logits
    calls = counted(monkeypatch, attention, "causal_attention")
    attention.use_fast_attention(model, torch.bfloat16, CPU)
    found = model(tokens, attention_mask=padded).logits
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(found[1, 9:], expected[1, 9:], rtol=0.05, atol=0.05)
    assert not calls


@needs_bfloat16_tile
def test_options_that_change_the_result_stay_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 16, 32, generator=generator).bfloat16()
    bias = torch.randn(1, 2, 16, 16, generator=generator).bfloat16()
    module = nn.Module()
    calls = counted(monkeypatch, attention, "causal_attention")
    found, _ = attention._forward(module, query, key, value, None, is_causal=True, position_bias=bias)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=True, position_bias=bias)
    assert torch.equal(found, expected)
    assert not calls
    attention._forward(module, query, key, value, None, is_causal=True, position_ids=torch.arange(16)[None])
    assert len(calls) == 1


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_a_float32_linear_gives_the_same_outputs_and_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 7, bias=bias)
    fast = copy.deepcopy(plain)
    linears.use_fast_linears(fast, torch.float32, CPU)
    inputs = torch.randn(3, 5, 12, requires_grad=True)
    found, expected = (
        torch.autograd.grad(module(inputs).square().sum(), [inputs, *module.parameters()]) for module in (fast, plain)
    )
    torch.testing.assert_close(fast(inputs), plain(inputs))
    torch.testing.assert_close(found, expected)
    (of_one,) = torch.autograd.grad(fast(inputs[0, 0]).sum(), inputs)
    torch.testing.assert_close(of_one[0, 0], plain.weight.sum(0))
    crossed = inputs.detach().transpose(0, 1)
    torch.testing.assert_close(fast(crossed), plain(crossed))
    assert fast(inputs[:0]).shape == (0, 5, 7)


@needs_onednn
def test_a_float32_linear_does_not_run_on_torchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = nn.Linear(8, 8)
    linears.use_fast_linears(fast, torch.float32, CPU)
    calls = counted(monkeypatch, linears.functional, "linear")
    fast(torch.randn(2, 8))
    assert not calls
    fast(torch.randn(8, 2).t())
    assert len(calls) == 1


def test_a_float32_linear_is_freed_with_its_last_reference() -> None:
    fast = nn.Sequential(nn.Linear(8, 8))
    linears.use_fast_linears(fast, torch.float32, CPU)
    copied = copy.deepcopy(fast)
    weights = [weakref.ref(fast[0].weight), weakref.ref(copied[0].weight)]
    gc.disable()
    try:
        del fast, copied
        assert [weight() for weight in weights] == [None, None]
    finally:
        gc.enable()


def test_a_copy_of_a_float32_linear_multiplies_with_its_own_weight() -> None:
    block = nn.Sequential(nn.Linear(6, 4))
    linears.use_fast_linears(block, torch.float32, CPU)
    twin, inputs = copy.deepcopy(block), torch.randn(2, 6)
    block[0].weight.data.zero_()
    torch.testing.assert_close(twin(inputs), nn.functional.linear(inputs, twin[0].weight, twin[0].bias))
    replaced = functional_call(block, {"0.weight": twin[0].weight}, (inputs,))
    torch.testing.assert_close(replaced, twin(inputs))


@needs_onednn
def test_linears_of_other_kinds_and_places_are_left() -> None:
    class Other(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) + 1

    modules = nn.ModuleList([Other(4, 4), nn.Linear(4, 4)])
    linears.use_fast_linears(modules, torch.bfloat16, CPU)
    linears.use_fast_linears(modules, torch.float32, torch.device("cuda"))
    assert [type(module) for module in modules] == [Other, nn.Linear]
    linears.use_fast_linears(modules, torch.float32, CPU)
    assert [type(module) for module in modules] == [Other, linears.FastLinear]
    with torch.autocast("cpu", torch.bfloat16):
        assert modules[1](torch.randn(2, 4)).dtype is torch.bfloat16
    assert modules[1].to("meta")(torch.empty(2, 4, device="meta")).device.type == "meta"


def test_other_dtypes_keep_their_own_parts(model) -> None:
    attention_before = model.config._attn_implementation
    norms.use_fast_norms(model, torch.float32, CPU)
    activations.use_fast_activations(model, torch.float32, CPU)
    attention.use_fast_attention(model, torch.float32, CPU)
    assert not any(has_kernel(module) for module in model.modules())
    assert model.config._attn_implementation == attention_before
