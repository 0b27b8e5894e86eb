"""Structure of a model, found by observing a forward pass: blocks, linears and input groups."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from calibrant.errors import CalibrantError, first_line
from calibrant.modeling.hooks import Hook, hooked
from calibrant.modeling.inputs import MicroBatch, call_block


@dataclass(frozen=True)
class Linear:
    """One linear map of a block: ``y = x W^T`` with ``W`` ``[out_features, in_features]``.

    ``parameter`` is the name of its parameter in the block. ``transposed`` means that it is stored ``[in, out]``
    (Conv1D, some experts). ``expert`` is the index into a fused parameter ``[experts, ., .]``, otherwise None.
    """

    name: str
    parameter: str
    out_features: int
    in_features: int
    transposed: bool = False
    expert: int | None = None

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """This linear's weight ``[out_features, in_features]`` as a view of the value of ``self.parameter``."""
        tensor = parameter if self.expert is None else parameter[self.expert]
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same tensor; ``module`` is the linear called first."""

    module: str
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Experts:
    """A module with fused expert weights; ``groups[k]`` contains the linears of its k-th product, one per expert."""

    module: str
    groups: tuple[tuple[Linear, ...], ...]


Stage = InputGroup | Experts
_ALWAYS = sys.maxsize
# Set by transformers' decorator for classes of experts.
_EXPERTS_MARK = "_is_expert_parallel"


@dataclass(frozen=True)
class BlockStructure:
    """Structure of a block.

    Attributes:
        stages: the stages in execution order.
        unseen: names of fused parameters for which no product with a single expert was observed.
        last_use: number of stages reached at the last use of the input of each stage; at any later stage its memory can
            be released.
        hidden_last_use: the same number for the block's input.
        recurring: names of linears that are called more than once.
    """

    stages: tuple[Stage, ...]
    unseen: tuple[str, ...]
    last_use: tuple[int, ...]
    hidden_last_use: int
    recurring: frozenset[str] = frozenset()

    def partly(self, ignored: Callable[[str], bool]) -> list[str]:
        """A sentence for each group with both ignored and other linears, because inference engines fuse such groups."""
        sentences = []
        for stage in self.stages:
            if isinstance(stage, InputGroup):
                names = [linear.name for linear in stage.linears if ignored(linear.name)]
                if names and len(names) < len(stage.linears):
                    sentences.append(
                        f"{', '.join(names)}: left as they are beside compressed layers of the same input, which "
                        "engines like vLLM fuse with them; they may not load the result"
                    )
        return sentences

    def without(self, ignored: Callable[[str], bool]) -> "BlockStructure":
        """The structure without the linears whose names satisfy ``ignored``."""
        kept: list[tuple[int, Stage]] = []
        for index, stage in enumerate(self.stages):
            if isinstance(stage, InputGroup):
                linears = tuple(linear for linear in stage.linears if not ignored(linear.name))
                kept += [(index, InputGroup(stage.module, linears))] if linears else []
            else:
                groups = tuple(group for group in stage.groups if not ignored(group[0].parameter))
                kept += [(index, Experts(stage.module, groups))] if groups else []

        def reached(count: int) -> int:
            """Number of kept stages among the first ``count``."""
            return sum(index < count for index, _ in kept)

        return BlockStructure(
            tuple(stage for _, stage in kept),
            self.unseen,
            tuple(reached(self.last_use[index]) for index, _ in kept),
            reached(self.hidden_last_use),
            frozenset(name for name in self.recurring if not ignored(name)),
        )

    def linears(self) -> Iterator[Linear]:
        """All linears in stage order."""
        for stage in self.stages:
            if isinstance(stage, InputGroup):
                yield from stage.linears
            else:
                for group in stage.groups:
                    yield from group


def common_module(names: list[str]) -> str:
    """Name of the innermost module that contains all of ``names``; empty for the block itself."""
    parts = [name.split(".") for name in names]
    shared = 0
    while shared < min(map(len, parts)) and len({tuple(part[: shared + 1]) for part in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])


def probe_block(block: nn.Module, index: int, batch: MicroBatch) -> BlockStructure:
    """Find the structure of ``block``, number ``index``, by running it once on a small ``batch``.

    Raises:
        CalibrantError: the block needs more than its recorded arguments.
    """
    probe = _Probe(block, batch.hidden)
    linears = [(one, name) for name, one in block.named_modules() if isinstance(one, nn.Linear | Conv1D)]
    owners = {name.rpartition(".")[0] for name in fused_parameters(block)}
    hooks = [
        *((module, probe.linear_reached(name)) for module, name in linears),
        *((block.get_submodule(owner), probe.experts_reached(owner)) for owner in owners),
    ]
    with hooked(hooks), watch_experts(block, probe.product_seen), _Uses(probe.tensor_used):
        try:
            output = call_block(block, index, batch)
        except Exception as error:  # model code raises anything when a block gets less than the block before gave it
            raise CalibrantError(
                f"{type(block).__name__}: block {index} cannot be run alone with what the model handed it before its "
                f"blocks ran ({first_line(error)})"
            ) from error
        probe.tensor_returned(output)
    return probe.structure()


class _Probe:
    """Observer of one forward pass of a block."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor) -> None:
        self._hidden = hidden
        self._last_use: dict[int, int] = {}
        self._fused = fused_parameters(block)
        self._inputs: list[torch.Tensor] = []  # kept alive, because addresses of freed storage are reused
        self._seen: set[str] = set()
        self._recurring: set[str] = set()
        self._groups: dict[tuple[int, int, int], int] = {}
        self._stages: list[tuple[str, list[Linear], torch.Tensor | None]] = []
        self._products: dict[str, tuple[Linear, ...]] = {}

    def linear_reached(self, name: str) -> Hook:
        """Hook that adds a linear to the group of its input tensor."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self._seen:
                self._recurring.add(name)
                return
            self._seen.add(name)
            inputs = args[0]
            self._inputs.append(inputs)
            key = (inputs.data_ptr(), inputs.shape[-1], inputs.numel())
            if key not in self._groups:
                self._groups[key] = len(self._stages)
                self._stages.append((name, [], inputs))
            self._stages[self._groups[key]][1].append(_as_linear(name, module))

        return hook

    def experts_reached(self, owner: str) -> Hook:
        """Hook that adds a stage for a module with fused expert weights."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stages.append((owner, [], None))

        return hook

    def product_seen(self, use: "ExpertUse") -> None:
        """Record the orientation of a fused parameter, and the order of the products, at its first product."""
        if use.parameter in self._products:
            return
        experts, first, second = self._fused[use.parameter].shape
        out_features, in_features = (second, first) if use.transposed else (first, second)
        self._products[use.parameter] = tuple(
            Linear(f"{use.parameter}.{e}", use.parameter, out_features, in_features, use.transposed, e)
            for e in range(experts)
        )

    def tensor_used(self, tensor: torch.Tensor) -> None:
        """Record that an operation reads or writes ``tensor``."""
        self._inputs.append(tensor)
        self._last_use[_storage(tensor)] = len(self._stages)

    def tensor_returned(self, output: torch.Tensor) -> None:
        """Record that the block's output is used after all stages."""
        self._last_use[_storage(output)] = len(self._stages) + 1

    def structure(self) -> BlockStructure:
        """The observed structure, with stages in the order in which they were reached."""
        stages: list[Stage] = []
        last_use = []
        for module, linears, inputs in self._stages:
            groups = tuple(g for name, g in self._products.items() if name.rpartition(".")[0] == module)
            if linears:
                stages.append(InputGroup(module, tuple(linears)))
            elif groups:
                stages.append(Experts(module, groups))
            else:
                continue
            last_use.append(self._last_use[_storage(inputs)] if inputs is not None else _ALWAYS)
        unseen = tuple(name for name in self._fused if name not in self._products)
        hidden_last_use = self._last_use[_storage(self._hidden)]
        return BlockStructure(tuple(stages), unseen, tuple(last_use), hidden_last_use, frozenset(self._recurring))


class _Uses(TorchFunctionMode):
    """Reports every tensor argument of every operation."""

    def __init__(self, used: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._used = used

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._used(leaf)
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


def _as_linear(name: str, module: nn.Module) -> Linear:
    rows, columns = module.get_parameter("weight").shape
    if isinstance(module, Conv1D):
        return Linear(name, f"{name}.weight", columns, rows, transposed=True)
    return Linear(name, f"{name}.weight", rows, columns)


def fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Fused expert weights by name: parameters ``[experts, ., .]`` of modules that know their number of experts.

    Other parameters with three dimensions (block-diagonal gates, convolutions, per-head projections) are no experts.
    """
    found = {}
    for owner, one in module.named_modules():
        counts = {value for key, value in vars(one).items() if "experts" in key and type(value) is int}
        for name, parameter in one.named_parameters(recurse=False):
            if parameter.ndim == 3 and (parameter.shape[0] in counts or hasattr(one, _EXPERTS_MARK)):
                found[f"{owner}.{name}" if owner else name] = parameter
    return found


def routers(module: nn.Module) -> list[str]:
    """Names of linears beside fused experts that have an output for each expert: they choose among these."""
    found = []
    for name, parameter in fused_parameters(module).items():
        beside = name.rpartition(".")[0].rpartition(".")[0]
        for leaf, child in module.get_submodule(beside).named_children():
            if isinstance(child, nn.Linear) and child.out_features == parameter.shape[0]:
                found.append(f"{beside}.{leaf}" if beside else leaf)
    return sorted(set(found))


@dataclass(frozen=True)
class ExpertUse:
    """A product of ``inputs`` ``[tokens, in]`` with number ``expert`` of a fused parameter.

    ``whole_batch``: the product is one of a batch with all experts, each of which gets a row for every token.
    """

    parameter: str
    expert: int
    transposed: bool
    inputs: torch.Tensor
    whole_batch: bool = False


def expert_products(func: Callable[..., Any], args: tuple[Any, ...], fused: dict[str, nn.Parameter]) -> list[ExpertUse]:
    """Recognize ``linear(x, P[e])``, ``x @ P[e]`` and ``bmm(x, P)`` by the weight's address; [] for other calls."""
    if func in (torch.bmm, torch.Tensor.bmm):
        return _batched_products(args[0], args[1], fused)
    if func is torch.nn.functional.linear:
        transposed = False
    elif func in (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm):
        transposed = True
    else:
        return []
    inputs, weight = args[0], args[1]
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.device.type == "meta":
        return []
    for name, parameter in fused.items():
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        expert, rest = divmod(offset, parameter.stride(0))
        if rest == 0 and 0 <= expert < parameter.shape[0] and weight.shape == parameter.shape[1:]:
            return [ExpertUse(name, int(expert), transposed, inputs)]
    return []


def _batched_products(inputs: torch.Tensor, weight: torch.Tensor, fused: dict[str, nn.Parameter]) -> list[ExpertUse]:
    for name, parameter in fused.items():
        if weight.data_ptr() == parameter.data_ptr() and weight.shape == parameter.shape:
            return [ExpertUse(name, expert, True, rows, whole_batch=True) for expert, rows in enumerate(inputs)]
    return []


@contextmanager
def watch_experts(block: nn.Module, seen: Callable[[ExpertUse], None]) -> Iterator[None]:
    """Call ``seen`` with every expert product inside the context."""
    fused = fused_parameters(block)

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            for use in expert_products(func, args, fused):
                seen(use)
            return func(*args, **(kwargs or {}))

    with Watch():
        yield
