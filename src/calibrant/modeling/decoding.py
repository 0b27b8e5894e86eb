"""Decoding step by step, one token per row, where each row can restart independently."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from calibrant.kernels import bfloat16_tile, float32_tile
from calibrant.kernels.decode_attention import decode_attention
from calibrant.kernels.packed_linear import PackedFloat32Linear, PackedLinear
from calibrant.modeling.activations import use_fast_activations
from calibrant.modeling.norms import use_fast_norms

_NAME = "calibrant_decode"
# Arguments that do not change what attention computes.
_IGNORED_ARGUMENTS = {
    "position_ids", "use_cache", "past_key_values", "cache_position", "is_causal", "output_attentions",
    "output_router_logits",
}  # fmt: skip
_PROBE_ROWS, _PROBE_STEPS = 3, 6
# Limit of the mean deviation of logits, relative to their standard deviation: another order of sums rounds differently.
_TOLERANCE = 0.05


class Decoder(Protocol):
    """A model together with the tokens it has read so far, one sequence per row."""

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read one more token per row and return float32 logits ``[rows, vocabulary]``.

        ``tokens`` and ``positions`` are int64 ``[rows]``. A row at position 0 restarts and no longer attends to earlier
        tokens.
        """


def prepare_decoding(model: transformers.PreTrainedModel) -> Callable[[int, int], Decoder]:
    """Return a function that makes a decoder from a number of rows and a number of steps.

    bfloat16 models on CPUs with AVX512-BF16, and float32 models on CPUs with AVX2, get packed weights and our
    attention, provided that a probe of a few tokens gives the same logits as before; all other models run as in
    transformers. ``model`` may be modified and must only be used for decoding afterwards.
    """

    def plain(rows: int, length: int) -> Decoder:
        return PlainDecoder(model, rows, length)

    def fast(rows: int, length: int) -> Decoder:
        return FastDecoder(model, rows, length)

    if model.config._attn_implementation == _NAME:  # prepared before
        return fast
    tiles = {torch.bfloat16: bfloat16_tile.available(), torch.float32: float32_tile.available()}
    if model.device.type != "cpu" or not tiles.get(model.dtype):
        return plain
    expected = _probe(plain, model.config.get_text_config().vocab_size)
    with _fast_parts(model) as parts:
        try:
            found = _probe(fast, model.config.get_text_config().vocab_size)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
            return plain  # the model uses its attention or linears in a way that ours do not support
        parts.keep = bool((found - expected).abs().mean() < _TOLERANCE * expected.std())
        return fast if parts.keep else plain


def _probe(make: Callable[[int, int], Decoder], vocabulary: int) -> torch.Tensor:
    """Logits of a few steps, during which one row restarts."""
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
    """Decodes with the forward of transformers and a static cache."""

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
    """Decodes with ``decode_attention`` over a cache laid out for it, without a mask."""

    def __init__(self, model: transformers.PreTrainedModel, rows: int, length: int) -> None:
        self._model = model
        self._first = torch.zeros(rows, dtype=torch.long)
        self._layers = [_CacheLayer(length) for _ in range(model.config.get_text_config().num_hidden_layers)]
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
        unknown = [name for name, value in kwargs.items() if value is not None and name not in _IGNORED_ARGUMENTS]
        if unknown or attention_mask is not None or query.shape[2] != 1:
            raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask'}")
        first = self._first
        if sliding_window is not None:
            first = first.clamp(min=self._count - sliding_window)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return decode_attention(query, key, value, first, self._count, scale), None


class _CacheLayer(CacheLayerMixin):
    """Cache of keys ``[rows, heads, width, length]`` and values ``[rows, heads, length, width]``, filled by steps."""

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
class _FastParts:
    """Whether the fast parts stay in the model."""

    keep: bool = False


@contextmanager
def _fast_parts(model: transformers.PreTrainedModel) -> Iterator[_FastParts]:
    """Give the model packed linears and our attention; restore it on exit unless ``keep`` is set."""
    kind = PackedLinear if model.dtype is torch.bfloat16 else PackedFloat32Linear
    names = [
        name for name, module in model.named_modules() if type(module) is nn.Linear and _packable(module, model.dtype)
    ]
    attention, parts = model.config._attn_implementation, _FastParts()
    AttentionInterface.register(_NAME, _refuse_attention)
    use_fast_norms(model, model.dtype, model.device)
    use_fast_activations(model, model.dtype, model.device)
    try:
        for name in names:
            # One at a time, and without a reference to what is replaced: a weight is in memory once.
            model.set_submodule(name, kind(model.get_submodule(name)))  # type: ignore[arg-type]
        model.set_attn_implementation(_NAME)
        yield parts
    finally:
        if not parts.keep:
            for name in names:
                packed = model.get_submodule(name)
                if isinstance(packed, kind):
                    model.set_submodule(name, packed.unpacked())
            model.tie_weights()
            model.set_attn_implementation(attention)


def _packable(linear: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether a packed linear does all that ``linear`` does; hooks would be lost, such as those that round inputs."""
    hooks = linear._forward_pre_hooks or linear._forward_hooks
    pairs = dtype is torch.float32 or linear.in_features % 2 == 0
    return linear.weight.dtype is dtype and pairs and not hooks


def _refuse_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    raise RuntimeError("this model was prepared for decoding and cannot run otherwise")
