"""2SSP: remove the least active neurons of every MLP, then attention modules one by one (arXiv 2501.17771).

The result is a smaller dense model with narrower MLPs. Standard model classes cannot omit an attention module, so its
last linear is stored as zeros, which computes the same function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from calibrant.engine.checkpoint_writer import CheckpointWriter
from calibrant.engine.walk_checkpoints import WalkCheckpoints
from calibrant.errors import CalibrantError, first_line
from calibrant.journal import Journal
from calibrant.modeling.block_parts import BlockParts, attention_left_out, find_parts, narrowed
from calibrant.modeling.block_walk import BlockWalk, OpenedBlock
from calibrant.modeling.hooks import Hook, hooked
from calibrant.modeling.inputs import MicroBatch, finish
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.losses import negative_log_likelihoods
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.recipes.plan import Plan
from calibrant.stopping import check_stop

# Keys of the MLP's width in configurations.
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner")
_ATTENTION_EXPONENT = 1.5
# Positions whose logits are in memory at a time.
_POSITIONS = 256
NEURONS, ATTENTION = "neurons", "attention"
"""Names of the stages' states in the journal."""


@dataclass(frozen=True)
class Pruned:
    """Result of 2SSP.

    Attributes:
        neurons: neurons kept in each MLP.
        neurons_before: neurons of each MLP of the original model.
        attention_removed: indices of the blocks without attention, in order of removal.
        losses: mean negative log-likelihoods in nats on ``row``, before the first removal and after each; empty if no
            attention is removed.
        row: index of the calibration row on which losses are measured.
        share: removed share of the blocks' parameters.
    """

    neurons: int
    neurons_before: int
    attention_removed: list[int]
    losses: list[float]
    row: int
    share: float

    def sentence(self) -> str:
        """Summary for the user."""
        removed = ", ".join(map(str, self.attention_removed)) or "none"
        return (
            f"2ssp: MLPs narrowed from {self.neurons_before} to {self.neurons} neurons; attention left out of blocks "
            f"{removed} (their last linear is zero); {self.share:.1%} of the blocks' parameters gone"
        )


def removals(blocks: int, attention: int, mlp: int, total: int, share: float) -> tuple[int, float]:
    """Number of attention modules to remove, and share of every MLP to remove.

    ``attention`` and ``mlp`` are numbers of parameters of one block (A and M), ``total`` of all ``blocks`` (N), and
    ``share`` (p) is the part to remove. The released code removes ``round(N p^((M/A)/1.5))`` attention modules.

    Raises:
        ValueError: this rule cannot reach the share.
    """
    count = round(blocks * share ** ((mlp / attention) / _ATTENTION_EXPONENT))
    left = round(share * total) - count * attention
    if left < 0:
        raise ValueError(f"{count} attention modules alone are more than {share:g} of the parameters")
    of_mlp = round(left / blocks) / mlp
    if of_mlp >= 1:
        raise ValueError(f"{share:g} of the parameters are more than all MLPs")
    return count, of_mlp


@torch.inference_mode()
def check_structure(model: LazyModel, plan: Plan) -> None:
    """Check the first block, before a calibration set is generated for a model that 2SSP does not support.

    Raises:
        CalibrantError: 2SSP does not support the block.
    """
    _text_config(model)
    _find_all_parts(model, plan.blocks, 1)


@torch.inference_mode()
def prune_structure(
    model: LazyModel,
    plan: Plan,
    rows: TokenRows,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    journal: Journal,
    progress: Progress,
) -> tuple[Pruned, dict[str, Any]]:
    """Prune and write the blocks; returns the result and the changed ``config.json``.

    What is measured is saved in ``journal``, from which a later call goes on.

    Raises:
        CalibrantError: 2SSP does not support the blocks, their widths differ, or the share cannot be reached.
    """
    config, width_key = _text_config(model)
    parts, total = _find_all_parts(model, plan.blocks, len(plan.blocks))
    first = parts[0]
    if len({one.neurons for one in parts}) > 1 or config[width_key] not in (None, first.neurons):
        raise CalibrantError(
            f"{model.folder.path}: its MLPs differ in width, which 2ssp's result could not be stored as"
        )
    sparsity = plan.target.sparsity
    assert sparsity is not None
    sizes = (len(parts), first.attention_parameters, first.mlp_parameters, total)
    try:
        count, of_mlp = removals(*sizes, sparsity.share)
    except ValueError as error:
        raise CalibrantError(f"recipe {plan.recipe.name}: {error}") from error
    neurons = round(first.neurons * (1 - of_mlp))
    if neurons < 1:
        raise CalibrantError(
            f"recipe {plan.recipe.name}: {sparsity.share:g} of the parameters leaves no neuron; take less"
        )
    writer.start_empty()
    search = _Search.restored(journal, model.device) or _Search(
        journal, _neuron_norms(model, plan.blocks, parts, rows, dtype, journal, progress)
    )
    norms = search.norms
    kept = [torch.argsort(norm, descending=True, stable=True)[:neurons].sort().values for norm in norms]
    removal = _AttentionRemoval(model, plan.blocks, parts, kept, rows, dtype, search, progress)
    removed, losses = removal.run(count)
    gone = 0
    for index, (prefix, part) in enumerate(zip(plan.blocks, parts, strict=True)):
        gone += _write(model, prefix, part, kept[index], index in removed, writer)
    config[width_key] = neurons
    done = Pruned(neurons, first.neurons, removed, losses, removal.row, gone / total)
    return done, _with_text_config(model, config)


def _text_config(model: LazyModel) -> tuple[dict[str, Any], str]:
    """Copy of the part of ``config.json`` that describes the language model, and its key for the MLP's width."""
    whole = model.folder.config_dict
    config = dict(whole.get("text_config", whole))
    for key in _WIDTH_KEYS:
        # In GPT-2 an empty value means four times the hidden width.
        if key in config and isinstance(config[key], int | None):
            return config, key
    raise CalibrantError(
        f"{model.folder.path}: its config.json names no width of the MLPs ({', '.join(_WIDTH_KEYS)}), so 2ssp cannot "
        "store narrower ones"
    )


def _with_text_config(model: LazyModel, config: dict[str, Any]) -> dict[str, Any]:
    whole = model.folder.config_dict
    return {**whole, "text_config": config} if "text_config" in whole else config


def _find_all_parts(model: LazyModel, blocks: list[str], count: int) -> tuple[list[BlockParts], int]:
    """The parts of the first ``count`` blocks, and the number of parameters of these blocks."""
    walk = BlockWalk(model, blocks, None, torch.float32)
    parts, total = [], 0
    for index, prefix in enumerate(blocks[:count]):
        _refuse_merged(model, prefix)
        with walk.opened(index) as block:
            total += sum(parameter.numel() for parameter in block.module.parameters())
            part = find_parts(block)
            if not bool(block.module.get_parameter(part.attention_out.parameter).any()):
                raise CalibrantError(
                    f"{prefix}: its attention is left out already; prune the original model by more instead"
                )
            parts.append(part)
    return parts, total


def _refuse_merged(model: LazyModel, prefix: str) -> None:
    for name, _ in model.module.get_submodule(prefix).named_parameters():
        if not model.is_stored_alone(f"{prefix}.{name}"):
            raise CalibrantError(f"{prefix}.{name}: stored within another tensor, so 2ssp cannot write its block")


def _neuron_norms(
    model: LazyModel,
    blocks: list[str],
    parts: list[BlockParts],
    rows: TokenRows,
    dtype: torch.dtype,
    journal: Journal,
    progress: Progress,
) -> list[torch.Tensor]:
    """Norms ``[neurons]`` per block: the L2 norm of each neuron over a row's counted positions, summed over rows."""
    checkpoints = WalkCheckpoints(BlockWalk(model, blocks, rows, dtype), journal, NEURONS)
    norms: list[torch.Tensor] = [norm.to(model.device) for norm in (checkpoints.found or {"norms": []})["norms"]]
    for block in checkpoints.visit("measuring neurons", lambda: {"norms": norms}, progress):
        norm = torch.zeros(parts[block.index].neurons, device=model.device)
        down = block.module.get_submodule(parts[block.index].down.name)
        for batch in block.batches:
            with hooked([(down, _adder(norm, batch))]):
                batch.advance(block.run(batch))
        norms.append(norm)
    return norms


def _adder(norm: torch.Tensor, batch: MicroBatch) -> Hook:
    def add(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0].reshape(*batch.mask.shape, -1)
        for row, mask in zip(inputs, batch.mask, strict=True):
            norm.add_(row[mask].float().square_().sum(0).sqrt_())

    return add


@dataclass
class _Search:
    """What is found so far, kept in ``journal``: norms of neurons, blocks without attention, losses (``Pruned``)."""

    journal: Journal
    norms: list[torch.Tensor]
    removed: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.save()

    def save(self) -> None:
        self.journal.write(ATTENTION, {"norms": self.norms, "removed": self.removed, "losses": self.losses})
        self.journal.drop(NEURONS)

    @classmethod
    def restored(cls, journal: Journal, device: torch.device) -> "_Search | None":
        """What an interrupted run has found; None if its first stage did not end.

        Raises:
            CalibrantError: the journal is damaged.
        """
        state = journal.read(ATTENTION)
        if state is None:
            return None
        try:
            return cls(journal, [norm.to(device) for norm in state["norms"]], state["removed"], state["losses"])
        except (KeyError, AttributeError, TypeError) as error:
            raise journal.damaged(journal.folder, first_line(error)) from error


class _AttentionRemoval:
    """Stage 2: repeatedly remove the attention module whose removal increases the loss on one row least.

    All candidates of a round pass through the blocks together, so that each block is read once per round.
    """

    def __init__(
        self,
        model: LazyModel,
        blocks: list[str],
        parts: list[BlockParts],
        kept: list[torch.Tensor],
        rows: TokenRows,
        dtype: torch.dtype,
        search: "_Search",
        progress: Progress,
    ) -> None:
        self._parts, self._kept, self._search, self._progress = parts, kept, search, progress
        self.row = int(rows.counted.sum(1).argmax())
        row = slice(self.row, self.row + 1)
        self._walk = BlockWalk(model, blocks, TokenRows(rows.ids[row], rows.counted[row]), dtype)
        (self._start,) = self._walk.batches
        length = self._start.hidden.shape[1]
        self._tokens = rows.ids[self.row, :length].long().to(model.device)

    def run(self, count: int) -> tuple[list[int], list[float]]:
        """Remove ``count`` modules; returns their blocks in order, and the losses before and after each removal."""
        removed, losses = self._search.removed, self._search.losses
        if not count:
            return removed, losses
        with self._progress.task("removing attention", count * len(self._parts), "passes") as task:
            if removed:
                task.advance(len(removed) * len(self._parts))
            while len(removed) < count:
                trunk, candidates = self._round(removed, task.advance)
                found = self._losses({-1: trunk, **candidates})
                losses += [] if losses else [found[-1]]
                del found[-1]
                best = min(found, key=lambda index: (found[index], index))
                removed.append(best)
                losses.append(found[best])
                self._search.save()
                check_stop(f"{len(removed)} of {count} attention modules")
        return removed, losses

    def _round(self, removed: list[int], advance: Any) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The last block's output without the removed modules, and with one more removed, by index of its block."""
        trunk, candidates = self._start.hidden, dict[int, torch.Tensor]()
        for index, part in enumerate(self._parts):
            with self._narrowed(index) as block:
                if index in removed:
                    with attention_left_out(block.module, part):
                        candidates = {key: block.run_on(hidden, self._start) for key, hidden in candidates.items()}
                        trunk = block.run_on(trunk, self._start)
                else:
                    candidates = {key: block.run_on(hidden, self._start) for key, hidden in candidates.items()}
                    with attention_left_out(block.module, part):
                        candidates[index] = block.run_on(trunk, self._start)
                    trunk = block.run_on(trunk, self._start)
            advance()
        return trunk, candidates

    @contextmanager
    def _narrowed(self, index: int) -> Iterator[OpenedBlock]:
        with self._walk.opened(index) as block, narrowed(block.module, self._parts[index], self._kept[index]):
            yield block

    def _losses(self, states: dict[int, torch.Tensor]) -> dict[int, float]:
        """Mean negative log-likelihood in nats of the row's counted next tokens, for each of ``states``."""
        with self._walk.outside_loaded():
            return {number: self._loss(hidden) for number, hidden in states.items()}

    def _loss(self, hidden: torch.Tensor) -> float:
        wanted = self._start.mask[0, 1:]
        total = 0.0
        for begin in range(0, len(wanted), _POSITIONS):
            here = slice(begin, min(begin + _POSITIONS, len(wanted)))
            logits = finish(self._walk.model.module, self._walk.blocks, hidden[:, here])[0]
            losses = negative_log_likelihoods(logits, self._tokens[1:][here])
            total += float(losses[wanted[here]].double().sum())
        return total / max(int(wanted.sum()), 1)


def _write(
    model: LazyModel, prefix: str, part: BlockParts, kept: torch.Tensor, no_attention: bool, writer: CheckpointWriter
) -> int:
    """Write a block with its kept values unchanged; returns the number of parameters removed or set to zero."""
    names = [name for name, _ in model.module.get_submodule(prefix).named_parameters()]
    stored = {name: model.stored_name(f"{prefix}.{name}") for name in names}
    parameters = {name: model.folder.read(stored[name]) for name in names}
    changed = part.narrow(parameters, kept.cpu())
    gone = sum(parameters[name].numel() - value.numel() for name, value in changed.items())
    if no_attention:
        changed |= part.without_attention(parameters)
        gone += part.attention_parameters
    written = {stored[name]: changed.get(name, value) for name, value in parameters.items()}
    # Some checkpoints store tensors of a block that are not parameters.
    rest = {name: model.folder.read(name) for name in model.checkpoint_names(prefix) if name not in written}
    writer.write({**rest, **written})
    return gone
