"""Running a model one token a row at a time, where rows may start over on their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from calibrant.kernels import bfloat16_tile
from calibrant.kernels.decode_attention import decode_attention
from calibrant.kernels.packed_linear import PackedLinear
from calibrant.modeling.activations import use_fast_activations
from calibrant.modeling.norms import use_fast_norms

_NAME = "calibrant_decode"
# What attention may be called with and still be plain attention.
_HARMLESS = {"position_ids", "use_cache", "past_key_values", "cache_position", "is_causal", "output_attentions"} | {
    "output_router_logits"
}
_PROBE_ROWS, _PROBE_STEPS = 3, 6
# bfloat16 rounds differently in another order: mean deviation of logits, as a share of their standard deviation.
_TOLERANCE = 0.05


class Decoder(Protocol):
    """A model with the tokens it was shown so far, one sequence a row."""

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``[rows, vocabulary]`` after one more token a row.

        ``tokens`` and ``positions`` int64 ``[rows]``; at position 0 a row starts over and sees nothing of what came
        before.
        """


def prepare_decoding(model: transformers.PreTrainedModel) -> Callable[[int, int], Decoder]:
    """What makes a decoder for a number of rows and of steps.

    bfloat16 models on CPUs with AVX512-BF16 get packed weights and our attention, if both then compute what the model
    computed before, seen on a few tokens; all others run as transformers runs them. Either way ``model`` may be changed
    and is for decoding only afterwards.
    """

    def plain(rows: int, length: int) -> Decoder:
        return PlainDecoder(model, rows, length)

    def fast(rows: int, length: int) -> Decoder:
        return FastDecoder(model, rows, length)

    if model.config._attn_implementation == _NAME:  # prepared before
        return fast
    if model.dtype is not torch.bfloat16 or model.device.type != "cpu" or not bfloat16_tile.available():
        return plain
    expected = _probe(plain, model.config.get_text_config().vocab_size)
    with _fast_parts(model) as parts:
        try:
            found = _probe(fast, model.config.get_text_config().vocab_size)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
            return plain  # its attention or its linears are used in another way than ours can be
        parts.keep = bool((found - expected).abs().mean() < _TOLERANCE * expected.std())
        return fast if parts.keep else plain


def _probe(make: Callable[[int, int], Decoder], vocabulary: int) -> torch.Tensor:
    """Logits of a few steps, one of the rows starting over."""
    decoder = make(_PROBE_ROWS, _PROBE_STEPS)
    positions = torch.zeros(_PROBE_ROWS, dtype=torch.long)
    logits = []
    for step in range(_PROBE_STEPS):
        tokens = (torch.arange(_PROBE_ROWS) * 7919 + step * 104729 + 11) % vocabulary
        if step == _PROBE_STEPS // 2:
            positions[1] = 0
        logits.append(decoder.step(tokens, positions))
        positions = positions + 1
    return torch.stack(logits)


class PlainDecoder:
    """transformers' own forward with a static cache."""

    def __init__(self, model: transformers.PreTrainedModel, rows: int, length: int) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._attended = torch.zeros((rows, length), dtype=torch.long, device=model.device)
        self._count = 0

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See ``Decoder``."""
        self._attended[positions == 0] = 0
        self._attended[:, self._count] = 1
        self._count += 1
        return _last_logits(self._model, tokens, positions, self._attended, self._cache)


class FastDecoder:
    """The model's modules over a cache of our own layout, with ``decode_attention`` and no mask."""

    def __init__(self, model: transformers.PreTrainedModel, rows: int, length: int) -> None:
        self._model = model
        self._first = torch.zeros(rows, dtype=torch.long)
        self._layers = [_Layer(length) for _ in range(model.config.get_text_config().num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._count = 0

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See ``Decoder``."""
        self._first = torch.where(positions == 0, self._count, self._first)
        self._count += 1
        AttentionInterface.register(_NAME, self._attend)
        return _last_logits(self._model, tokens, positions, None, self._cache)

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        unknown = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
        if unknown or attention_mask is not None or query.shape[2] != 1:
            raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask'}")
        first = self._first
        if sliding_window is not None:
            first = first.clamp(min=self._count - sliding_window)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return decode_attention(query, key, value, first, self._count, scale), None


class _Layer(CacheLayerMixin):
    """Keys ``[rows, heads, width, length]`` and values ``[rows, heads, length, width]``, filled step by step."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of transformers
        self._length, self._count = length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, width, self._length)
        self.values = value_states.new_zeros(rows, heads, self._length, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys[..., self._count] = key_states[:, :, 0]
        self.values[:, :, self._count] = value_states[:, :, 0]
        self._count += 1
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._count + query_length, 0

    def get_max_length(self) -> int:
        return self._length


def _last_logits(
    model: transformers.PreTrainedModel,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    attended: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=tokens[:, None],
        attention_mask=attended,
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits[:, -1].float()


@dataclass
class _Parts:
    """Whether the changed parts stay."""

    keep: bool = False


@contextmanager
def _fast_parts(model: transformers.PreTrainedModel) -> Iterator[_Parts]:
    """The model with packed linears and our attention; put back on leaving unless they are to be kept."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.in_features % 2 == 0
    }
    attention, parts = model.config._attn_implementation, _Parts()
    AttentionInterface.register(_NAME, _no_decoder)
    use_fast_norms(model, torch.bfloat16, torch.device("cpu"))
    use_fast_activations(model, torch.bfloat16, torch.device("cpu"))
    try:
        for name, linear in linears.items():
            model.set_submodule(name, PackedLinear(linear))
        model.set_attn_implementation(_NAME)
        yield parts
    finally:
        if not parts.keep:
            for name, linear in linears.items():
                model.set_submodule(name, linear)
            model.set_attn_implementation(attention)


def _no_decoder(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    raise RuntimeError("this model was prepared for decoding and cannot run otherwise")
