"""Pairs of a producer and an input group between which a scale can be folded, found by trial (ours).

Candidates come from the data flow of one small pass: a norm whose output tensor the input group reads, or an earlier
linear with as many outputs as the group has inputs. A candidate is accepted if dividing the producer by a random scale
and multiplying the group's columns by it leaves the block's output unchanged.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.hooks import Hook, hooked, swapped
from calibrant.modeling.structure import InputGroup, Linear

# Scaling by powers of two is exact, so a valid candidate changes almost nothing in any dtype.
_SCALES = (0.5, 1.0, 2.0, 4.0)
_UNCHANGED = 1e-4
# A gain stored as its difference from 1 cannot be divided without rounding.
_UNCHANGED_WITH_OFFSET = 5e-2


@dataclass(frozen=True)
class Producer:
    """The module that produces the input channels of a group: a norm or a linear.

    Attributes:
        norm: name of a norm with ``weight`` ``[in]`` and optionally ``bias`` ``[in]``; its gain is ``weight + offset``.
        offset: 1 for norms that store their gain as its difference from 1, otherwise 0.
        linear: a linear with one output channel per input channel of the group.
        bias: name of the producer's bias parameter, if it has one.
    """

    norm: str | None = None
    offset: float = 0.0
    linear: Linear | None = None
    bias: str | None = None

    @property
    def name(self) -> str | None:
        """Name of the module."""
        return self.linear.name if self.linear is not None else self.norm


@dataclass(frozen=True)
class FoldablePair:
    """A producer and the input group whose column scales can be folded into it."""

    producer: Producer
    group: InputGroup

    def changed(self) -> list[str]:
        """Names of the parameters that a fold changes."""
        return [name for name, _ in _divided(self.producer)] + [linear.parameter for linear in self.group.linears]

    def fold(self, parameters: dict[str, torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        """Divide the producer by ``scale`` ``[in]`` and multiply the group's columns, in place.

        Returns the applied scale, which accounts for the rounding of a norm's weight to its stored dtype.
        """
        applied, values = self.folded(parameters, scale, {name: parameters[name].dtype for name in self.changed()})
        for name, value in values:
            parameters[name].copy_(value)
        return applied

    def folded(
        self, parameters: Mapping[str, torch.Tensor], scale: torch.Tensor, stored: Mapping[str, torch.dtype]
    ) -> tuple[torch.Tensor, Iterator[tuple[str, torch.Tensor]]]:
        """The scale that ``fold`` applies, and the folded parameters: float32, rounded to their ``stored`` dtypes.

        The iterator computes one parameter at a time. The gradient of the rounding is the identity.
        """
        first = {}
        if self.producer.norm is not None:
            name = f"{self.producer.norm}.weight"
            first[name], scale = fold_gain(parameters[name], scale, self.producer.offset, stored[name])

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            yield from first.items()
            for name, transposed in _divided(self.producer):
                if name not in first:
                    rows = parameters[name].T if transposed else parameters[name]
                    divided = held(rows.float() / (scale[:, None] if rows.ndim == 2 else scale), stored[name])
                    yield name, divided.T if transposed else divided
            for linear in self.group.linears:
                columns = held(linear.view(parameters[linear.parameter]).float() * scale, stored[linear.parameter])
                yield linear.parameter, columns.T if linear.transposed else columns

        return scale, values()


def fold_gain(
    weight: torch.Tensor, scale: torch.Tensor, offset: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's gain by ``scale``; returns the ``weight`` ``[in]`` rounded to ``dtype`` and the applied scale.

    With an ``offset`` the weight is rounded to bfloat16 whatever the file's dtype: such models run in bfloat16, where a
    gain near zero loses precision, and the columns must compensate the gain as it is in bfloat16 (ours).
    """
    gain = weight.float() + offset
    wanted = gain / scale - offset
    if offset:
        rounded = held(wanted, torch.bfloat16)
        wanted = torch.where(rounded + offset == 0, wanted, rounded)
    stored = held(wanted, dtype)
    kept = (gain != 0) & (stored + offset != 0)
    return stored, torch.where(kept, gain / torch.where(kept, stored + offset, 1.0), scale)


def held(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 ``values`` rounded to ``dtype``, with a straight-through gradient."""
    return values if dtype == torch.float32 else values + (values.to(dtype).float() - values).detach()


def _divided(producer: Producer) -> list[tuple[str, bool]]:
    """Names of the producer's parameters that a fold divides, and whether each is stored transposed."""
    found = [(producer.bias, False)] if producer.bias is not None else []
    if producer.linear is not None:
        return [(producer.linear.parameter, producer.linear.transposed), *found]
    return [(f"{producer.norm}.weight", False), *found]


def find_foldable(block: OpenedBlock) -> list[FoldablePair]:
    """The pairs of ``block`` that pass the trial on its probe batch, at most one per input group."""
    with _watched(block.module) as seen:
        expected = block.run(block.probe)
    effect = (expected.float() - block.probe.hidden.float()).norm()
    pairs = []
    for number, stage in enumerate(block.structure.stages):
        if not isinstance(stage, InputGroup):
            continue
        for producer in _candidates(block, number, stage, seen):
            pair = FoldablePair(producer, stage)
            limit = _UNCHANGED_WITH_OFFSET if producer.offset else _UNCHANGED
            with swapped(_folded_at_random(pair, block.module)):
                change = (block.run(block.probe).float() - expected.float()).norm()
            if change <= limit * effect:
                pairs.append(pair)
                break
    return pairs


@contextmanager
def _watched(block: nn.Module) -> Iterator[dict[str, tuple[int, int]]]:
    """Addresses of every module's first argument and output by name; the tensors stay alive inside the context."""
    seen: dict[str, tuple[int, int]] = {}
    alive: list[object] = []

    def hook(name: str) -> Hook:
        def note(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            alive.extend((args, output))
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                seen.setdefault(name, (args[0].data_ptr(), output.data_ptr()))

        return note

    with hooked(((module, hook(name)) for name, module in block.named_modules() if name), after=True):
        yield seen


def _candidates(
    block: OpenedBlock, number: int, group: InputGroup, seen: dict[str, tuple[int, int]]
) -> Iterator[Producer]:
    width = group.linears[0].in_features
    address = seen[group.module][0] if group.module in seen else None
    for name, module in block.module.named_modules():
        shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
        is_norm = shapes in ({"weight": (width,)}, {"weight": (width,), "bias": (width,)})
        if is_norm and address is not None and name in seen and seen[name][1] == address:
            bias = f"{name}.bias" if "bias" in shapes else None
            yield Producer(norm=name, bias=bias)
            yield Producer(norm=name, offset=1.0, bias=bias)
    for stage in block.structure.stages[:number]:
        for linear in stage.linears if isinstance(stage, InputGroup) else ():
            if linear.out_features == width:
                biased = "bias" in dict(block.module.get_submodule(linear.name).named_parameters(recurse=False))
                yield Producer(linear=linear, bias=f"{linear.name}.bias" if biased else None)


def _folded_at_random(pair: FoldablePair, block: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a parameter and its value after folding a random scale."""
    parameters = {name: block.get_parameter(name).data for name in pair.changed()}
    width = pair.group.linears[0].in_features
    choice = torch.randint(len(_SCALES), (width,), generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(_SCALES)[choice].to(next(iter(parameters.values())).device)
    stored = {name: value.dtype for name, value in parameters.items()}
    return [(block.get_parameter(name), value) for name, value in pair.folded(parameters, scale, stored)[1]]
