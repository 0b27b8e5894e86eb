"""A walk of token rows through a model's blocks, with one block in memory at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from calibrant.modeling.entry import enter_blocks
from calibrant.modeling.inputs import Carried, MicroBatch, call_block
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.state_files import StateFiles, TensorFiles
from calibrant.modeling.structure import BlockStructure, probe_block
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.ranks import ALONE, Ranks

Batches = list[MicroBatch] | StateFiles


@dataclass(frozen=True)
class OpenedBlock:
    """One block in memory.

    ``module`` computes in the walk's dtype. ``state`` holds the parameters and buffers as they are stored, by name in
    the block. ``batches`` are the walk's, with the hidden states that enter this block; ``probe`` is a tiny batch.
    """

    index: int
    name: str
    module: nn.Module
    state: dict[str, torch.Tensor]
    structure: BlockStructure
    probe: MicroBatch
    batches: Batches

    def run(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states after the block, ``[rows, length, width]``."""
        return call_block(self.module, self.index, batch)

    def run_on(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """The same for other hidden states, with the arguments of ``batch``."""
        return self.run(replace(batch, hidden=hidden))

    def advance(
        self, outputs: Sequence[torch.Tensor] | None = None, originals: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Move the batches behind the block: to ``outputs``, or to what the block gives now.

        ``originals`` are the outputs of the original model, of a walk with its states.
        """
        for position, batch in enumerate(self.batches):
            hidden = self.run(batch) if outputs is None else outputs[position]
            batch.advance(hidden, originals[position] if originals is not None else None)

    def collector(self, name: str = "block") -> "list[torch.Tensor] | TensorFiles":
        """An empty sequence for one output per batch, held where the batches' states are; ``name`` tells two apart."""
        return self.batches.collector(name) if isinstance(self.batches, StateFiles) else []


class BlockWalk:
    """Token rows on a walk through the blocks of a model.

    Args:
        model: the model; only embeddings and final norm are loaded here, once.
        blocks: full names of its blocks, in order.
        rows: what walks; None walks nothing and only probes each block.
        dtype: what the blocks compute in.
        with_original: also carry the original model's hidden states, as ``MicroBatch.original``.
        states: folder for the hidden states; None keeps them in memory.
        ranks: processes that share the rows.

    Raises:
        CalibrantError: no token of ``rows`` counts, there are more ranks than micro-batches, or the model does not call
            its blocks one after the other.
    """

    def __init__(
        self,
        model: LazyModel,
        blocks: list[str],
        rows: TokenRows | None,
        dtype: torch.dtype,
        with_original: bool = False,
        states: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.blocks, self.dtype, self.ranks = model, blocks, dtype, ranks
        self.batches: Batches = StateFiles(states) if states is not None else []
        self.probe = enter_blocks(model, blocks, rows, dtype, self.batches.append, with_original, ranks)
        # What blocks before each return for the probe besides hidden states; blocks are opened in order first.
        self._before: dict[int, dict[Carried, Any]] = {0: {}}

    def state(self, index: int) -> dict[str, Any]:
        """What enters block ``index``, where the walk is, for ``resume``.

        Hidden states in files are on the disk afterwards and stay until ``release_others``.

        Raises:
            CalibrantError: the disk fails.
        """
        found: dict[str, Any] = {"probe": _listed(self._before.get(index, {}))}
        if isinstance(self.batches, StateFiles):
            hashes = self.batches.keep(index)
            return {**found, "files": hashes, "carried": [_listed(carried) for carried in self.batches.carried]}
        return {**found, "batches": [[one.hidden, one.original, _listed(one.carried)] for one in self.batches]}

    @property
    def state_bytes(self) -> int:
        """Bytes of hidden states that ``state`` returns or waits for."""
        if isinstance(self.batches, StateFiles):
            return self.batches.nbytes
        return sum(batch.nbytes for batch in self.batches)

    def release_others(self, index: int) -> None:
        """Remove hidden states in files that no later ``resume`` needs, once the state before ``index`` is saved."""
        if isinstance(self.batches, StateFiles):
            self.batches.release_others(index)

    def resume(self, index: int, state: dict[str, Any]) -> None:
        """Go on before block ``index`` with a ``state`` of the same walk, held in the same place.

        Raises:
            ValueError: the state is of another walk, or files are missing or damaged.
        """
        device = self.model.device
        if isinstance(self.batches, StateFiles):
            carried = [_from_list(one, device) for one in state["carried"]]
            self.batches.resume(index, carried, state["files"])
        else:
            for batch, (hidden, original, handed) in zip(self.batches, state["batches"], strict=True):
                if hidden.shape != batch.hidden.shape:
                    raise ValueError(f"hidden states of shape {tuple(hidden.shape)}, not {tuple(batch.hidden.shape)}")
                batch.hidden = hidden.to(device)
                batch.original = None if original is None else original.to(device)
                batch.carried = _from_list(handed, device)
        self._before[index] = _from_list(state["probe"], device)

    @contextmanager
    def opened(self, index: int) -> Iterator[OpenedBlock]:
        """Block number ``index``, loaded, cast and probed; dropped when the context ends."""
        name = self.blocks[index]
        with self.model.loaded(name) as module:
            state = {key: value.data for key, value in module.state_dict().items()}
            self.model.cast(name, self.dtype, copy=True)
            probe = replace(self.probe, carried=self._before.get(index, {}))
            structure = probe_block(module, index, probe)
            self._before[index + 1] = {**probe.carried, **probe.returned}
            if index + 1 < len(self.blocks):
                self.model.folder.prefetch(self.model.checkpoint_names(self.blocks[index + 1]))
            yield OpenedBlock(index, name, module, state, structure, probe, self.batches)

    def visit(self, label: str, progress: Progress) -> Iterator[OpenedBlock]:
        """Every block in order, each opened in turn; the caller advances the batches."""
        with progress.task(label, len(self.blocks), "blocks") as task:
            for index in range(len(self.blocks)):
                with self.opened(index) as block:
                    yield block
                task.advance()

    @contextmanager
    def outside_loaded(self) -> Iterator[None]:
        """Everything outside the blocks in memory (embeddings, final norm, head), in the walk's dtype."""
        # Tying may replace the data of a parameter (BERT's output bias), which tensors of inference mode refuse.
        with torch.inference_mode(False), torch.no_grad():
            self.model.load(self.model.names_outside(self.blocks))
            self.model.module.tie_weights()
            self.model.cast("", self.dtype)
        try:
            yield
        finally:
            self.model.drop(self.model.module)


def _listed(carried: dict[Carried, Any]) -> list[list[Any]]:
    """As lists that a journal holds; tensors are copies, since blocks may hand on what they share."""
    copied = tree_map_only(torch.Tensor, torch.clone, list(carried.values()))
    return [[one.call, one.position, value] for one, value in zip(carried, copied, strict=True)]


def _from_list(listed: list[list[Any]], device: torch.device) -> dict[Carried, Any]:
    """Inverse of ``_listed``."""
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), listed)
    return {Carried(call, position): value for call, position, value in moved}
