"""Inputs of the first block and arguments of every block, recorded by running the model up to its blocks."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from calibrant.errors import CalibrantError


@dataclass
class MicroBatch:
    """State of some rows of one length between two blocks.

    Attributes:
        hidden: hidden states ``[rows, length, width]`` that enter the next block.
        mask: counted tokens, bool ``[rows, length]``.
        calls: arguments of every block other than the hidden states.
        original: hidden states ``[rows, length, width]`` of the original model, if the run needs them.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    calls: "BlockCalls"
    original: torch.Tensor | None = None

    def beside(self) -> "MicroBatch":
        """The same rows with the hidden states of the original model."""
        assert self.original is not None
        return MicroBatch(self.original, self.mask, self.calls)


@dataclass(frozen=True)
class BlockCalls:
    """Positional and keyword arguments of every block, without the hidden states."""

    args: tuple[tuple[Any, ...], ...]
    kwargs: tuple[dict[str, Any], ...]

    def same_as(self, other: "BlockCalls") -> bool:
        """Whether all arguments are equal, so that ``other`` can be replaced by this object."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


class _BlocksReachedError(Exception):
    """Stops the forward pass once the last block has been called."""


class _Recorder(nn.Module):
    """Replacement for a block that records its arguments and returns the hidden states unchanged."""

    def __init__(self, block: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], as_tuple: bool) -> None:
        super().__init__()
        self._plain = {name: value for name, value in vars(block).items() if not name.startswith("_")}
        self._calls, self._as_tuple, self._last = calls, as_tuple, False

    def __getattr__(self, name: str) -> Any:
        # Models read settings such as layer types from their blocks.
        plain = self.__dict__.get("_plain", {})
        return plain[name] if name in plain else super().__getattr__(name)

    def mark_last(self) -> None:
        self._last = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.append((args, kwargs))
        if self._last:
            raise _BlocksReachedError
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._as_tuple else hidden


def record_inputs(
    model: transformers.PreTrainedModel, blocks: list[str], tokens: torch.Tensor
) -> tuple[torch.Tensor, BlockCalls]:
    """Run ``tokens`` ``[rows, length]`` through everything before the blocks.

    Returns the hidden states ``[rows, length, width]`` that enter block 0 and the other arguments of every block.

    Raises:
        CalibrantError: the model does not call its blocks one after the other.
    """
    for as_tuple in (False, True):
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        originals = [model.get_submodule(name) for name in blocks]
        recorders = [_Recorder(block, calls, as_tuple) for block in originals]
        recorders[-1].mark_last()
        _replace(model, blocks, recorders)
        try:
            model.base_model(input_ids=tokens, use_cache=False)
        except _BlocksReachedError:
            return _split(calls)
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            # A model whose blocks return tuples takes element 0 and fails on a plain tensor: retry with tuples.
            problem = error
        else:
            problem = RuntimeError("the last block was never called")
        finally:
            _replace(model, blocks, originals)
    raise CalibrantError(f"{type(model).__name__}: its blocks cannot be run one at a time ({problem})")


class _Replay(_Recorder):
    """Replacement for a block that returns the given hidden states."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, as_tuple: bool) -> None:
        super().__init__(block, [], as_tuple)
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self._hidden,) if self._as_tuple else self._hidden


def finish(model: transformers.PreTrainedModel, blocks: list[str], hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[rows, length, vocabulary]`` from the last block's output ``hidden`` ``[rows, length, width]``.

    The layers after the blocks treat every position independently, so ``hidden`` may be a subset of the positions. All
    weights outside the blocks must be loaded.

    Raises:
        CalibrantError: the model does not call its blocks one after the other.
    """
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    problem: Exception | None = None
    for as_tuple in (False, True):
        originals = [model.get_submodule(name) for name in blocks]
        _replace(model, blocks, [_Replay(block, hidden, as_tuple) for block in originals])
        try:
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
            if logits.shape[:2] == tokens.shape:
                return logits
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            problem = error
        finally:
            _replace(model, blocks, originals)
    raise CalibrantError(f"{type(model).__name__}: what lies behind its blocks cannot be run alone ({problem})")


def _replace(model: nn.Module, names: list[str], modules: Any) -> None:
    parent = model.get_submodule(names[0].rpartition(".")[0])
    for index, module in enumerate(modules):
        parent[index] = module  # type: ignore[operator]  # find_blocks saw a ModuleList


def _split(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[torch.Tensor, BlockCalls]:
    args, kwargs = calls[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    rest = tuple(call_args[1:] for call_args, _ in calls)
    named = tuple({k: v for k, v in call_kwargs.items() if k != "hidden_states"} for _, call_kwargs in calls)
    return hidden, BlockCalls(rest, named)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return type(left) is type(right) and len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    return bool(left is right or left == right)


def call_block(block: nn.Module, index: int, batch: MicroBatch) -> torch.Tensor:
    """Hidden states after block ``index``."""
    output = block(batch.hidden, *batch.calls.args[index], **batch.calls.kwargs[index])
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
