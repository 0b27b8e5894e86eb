"""Inputs of the first block and arguments of every block, recorded by running the model up to its blocks."""

import itertools
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from calibrant.errors import CalibrantError, first_line
from calibrant.modeling.hooks import replaced


@dataclass
class MicroBatch:
    """State of some rows of one length between two blocks.

    Attributes:
        hidden: hidden states ``[rows, length, width]`` that enter the next block.
        mask: counted tokens, bool ``[rows, length]``.
        calls: arguments of every block other than the hidden states.
        original: hidden states ``[rows, length, width]`` of the original model, if the run needs them.
        carried: what blocks before have returned for later ones besides hidden states.
        returned: the same of the latest run of the next block.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    calls: "BlockCalls"
    original: torch.Tensor | None = None
    carried: dict["Carried", Any] = field(default_factory=dict)
    returned: dict["Carried", Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return self.hidden.nbytes + (self.original.nbytes if self.original is not None else 0)

    def beside(self) -> "MicroBatch":
        """The same rows with the hidden states of the original model."""
        assert self.original is not None
        return MicroBatch(self.original, self.mask, self.calls)

    def advance(self, hidden: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Move behind the next block, whose output is ``hidden``, and ``original`` in the original model."""
        self.hidden, self.original = hidden, original
        self.carried.update(self.returned)
        self.returned.clear()


@dataclass(frozen=True)
class Carried:
    """Stands for what the block of call number ``call`` returns at ``position``, after its hidden states at 0."""

    call: int
    position: int


@dataclass(frozen=True)
class BlockCalls:
    """Positional and keyword arguments of every block, without the hidden states.

    ``Carried`` stands in them for what a block before returns.
    """

    args: tuple[tuple[Any, ...], ...]
    kwargs: tuple[dict[str, Any], ...]

    @cached_property
    def carried(self) -> frozenset[Carried]:
        """What blocks get from blocks before them besides hidden states."""
        return carried_values((self.args, self.kwargs))

    def same_as(self, other: "BlockCalls") -> bool:
        """Whether all arguments are equal, so that ``other`` can be replaced by this object."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


# The mask of the micro-batch that a block runs on, bool ``[rows, length]``; every greenlet has its own.
RUNNING_MASK: ContextVar[torch.Tensor] = ContextVar("RUNNING_MASK")
# What blocks return: the hidden states, or a tuple of so many values that begins with them.
RETURNED_VALUES = (0, 1, 2, 3)


def carried_values(arguments: Any) -> frozenset[Carried]:
    """The placeholders in ``arguments``."""
    return frozenset(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Carried))


def _returned(hidden: torch.Tensor, values: int, call: int) -> Any:
    return (hidden, *(Carried(call, position) for position in range(1, values))) if values else hidden


class _BlocksReachedError(Exception):
    """Stops the forward pass once the last block has been called."""


@dataclass(frozen=True)
class BlockCall:
    """One call of the block ``name``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """Hidden states ``[rows, length, width]``: the first positional argument, or ``hidden_states``."""
        hidden = self.args[0] if self.args else self.kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(f"{self.name} is called without hidden_states")
        return hidden


class Recorder(nn.Module):
    """Replacement for a block that records its calls and returns the hidden states unchanged.

    ``values`` is one of ``RETURNED_VALUES``.
    """

    def __init__(self, name: str, block: nn.Module, calls: list[BlockCall], values: int) -> None:
        super().__init__()
        # Not a submodule: nothing may reach the block's weights through the model while it is replaced.
        self.__dict__["_block"] = block
        self._name, self._calls, self._values, self._last = name, calls, values, False

    def __getattr__(self, name: str) -> Any:
        # Models read settings such as layer types from their blocks.
        return getattr(self.__dict__["_block"], name)

    def mark_last(self) -> None:
        """Stop the forward pass when this block is called."""
        self._last = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = BlockCall(self._name, args, kwargs)
        self._calls.append(call)
        if self._last:
            raise _BlocksReachedError
        return _returned(call.hidden, self._values, len(self._calls) - 1)


def record_inputs(
    model: transformers.PreTrainedModel, blocks: list[str], tokens: torch.Tensor
) -> tuple[torch.Tensor, BlockCalls]:
    """Run ``tokens`` ``[rows, length]`` through everything before the blocks.

    Returns the hidden states ``[rows, length, width]`` that enter block 0 and the other arguments of every block.

    Raises:
        CalibrantError: the model does not call its blocks one after the other.
    """
    for values in RETURNED_VALUES:
        calls: list[BlockCall] = []
        recorders = {name: Recorder(name, model.get_submodule(name), calls, values) for name in blocks}
        recorders[blocks[-1]].mark_last()
        with replaced(model, dict(recorders)):
            try:
                model.base_model(input_ids=tokens, use_cache=False)
                problem = "the last block was never called"
            except _BlocksReachedError:
                wrong = _wrong_order(blocks, calls)
                if wrong is None:
                    return _split(calls)
                problem = wrong
            except Exception as error:  # model code raises anything when it gets a tensor where it takes a tuple apart
                problem = first_line(error)
    raise not_one_at_a_time(model, problem)


def not_one_at_a_time(model: nn.Module, why: str) -> CalibrantError:
    """The error for a model whose blocks cannot be run alone."""
    return CalibrantError(f"{type(model).__name__}: its blocks cannot be run one at a time ({why})")


def changed_between(calls: list[BlockCall]) -> str | None:
    """What is wrong with ``calls`` if a block does not read what the block before it returned, else None."""
    for before, after in itertools.pairwise(calls):
        if before.hidden is not after.hidden and not _equal(before.hidden, after.hidden):
            return f"{after.name} does not read what {before.name} returns"
    return None


class _Replay(Recorder):
    """Replacement for a block that returns the given hidden states."""

    def __init__(self, name: str, block: nn.Module, hidden: torch.Tensor, values: int) -> None:
        super().__init__(name, block, [], values)
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _returned(self._hidden, self._values, 0)


def finish(model: transformers.PreTrainedModel, blocks: list[str], hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[rows, length, vocabulary]`` from the last block's output ``hidden`` ``[rows, length, width]``.

    The layers after the blocks treat every position independently, so ``hidden`` may be a subset of the positions. All
    weights outside the blocks must be loaded.

    Raises:
        CalibrantError: the model does not call its blocks one after the other.
    """
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    problem: Exception | None = None
    for values in RETURNED_VALUES:
        with replaced(model, {name: _Replay(name, model.get_submodule(name), hidden, values) for name in blocks}):
            try:
                logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
                if logits.shape[:2] == tokens.shape:
                    return logits
            except Exception as error:  # as in record_inputs
                problem = error
    raise CalibrantError(f"{type(model).__name__}: what lies behind its blocks cannot be run alone ({problem})")


def _wrong_order(blocks: list[str], calls: list[BlockCall]) -> str | None:
    if [call.name for call in calls] != blocks:
        return f"they are called in another order, {calls[0].name} first"
    return changed_between(calls)


def _split(calls: list[BlockCall]) -> tuple[torch.Tensor, BlockCalls]:
    rest = tuple(call.args[1:] for call in calls)
    named = tuple(
        {k: v for k, v in call.kwargs.items() if not (k == "hidden_states" and not call.args)} for call in calls
    )
    return calls[0].hidden, BlockCalls(rest, named)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return type(left) is type(right) and len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    return bool(left is right or left == right)


def call_block(block: nn.Module, index: int, batch: MicroBatch) -> torch.Tensor:
    """Hidden states after block ``index``; ``batch.returned`` gets what later blocks want besides."""
    RUNNING_MASK.set(batch.mask)
    args, kwargs = batch.calls.args[index], batch.calls.kwargs[index]
    if batch.calls.carried:
        args, kwargs = tree_map_only(Carried, batch.carried.__getitem__, (args, kwargs))
    output = block(batch.hidden, *args, **kwargs)
    batch.returned.clear()
    batch.returned.update({one: output[one.position] for one in batch.calls.carried if one.call == index})
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden
