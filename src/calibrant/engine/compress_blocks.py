"""Compression of a model block by block: load, transform, solve, write."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import torch

from calibrant.allocator import return_freed_memory
from calibrant.clock import Clock
from calibrant.engine.block_checkpoints import NAME, ON_DISK, BlockCheckpoints
from calibrant.engine.block_engine import sequential_pass, two_passes
from calibrant.engine.block_reconstruction import reconstruct
from calibrant.engine.block_solver import BlockSolver, LayerReport
from calibrant.engine.block_transforms import transform_block
from calibrant.engine.checkpoint_writer import CheckpointWriter
from calibrant.engine.suspended_passes import OrderDiffersError
from calibrant.errors import CalibrantError
from calibrant.journal import Journal, saved_numbers
from calibrant.modeling.block_walk import BlockWalk
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import BlockStructure, Experts
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.ranks import ALONE, Ranks
from calibrant.recipes.plan import Plan
from calibrant.stopping import check_stop, stop_requested, stopped

# "sequential": solve each input group on inputs from the compressed groups before it, in one suspended forward pass;
# "two-pass": collect all statistics of a block, solve it, run it again, as other tools do; "independent": every block
# gets the original model's hidden states.
Order = Literal["sequential", "two-pass", "independent"]

STATES = "states"
"""Subfolders of the journal for hidden states that memory has no room for, one for each rank, begin so."""

_NO_ORIGINAL = "the original model cannot run beside it; take a recipe without drift_correction and reconstruction"


def compress_blocks(
    model: LazyModel,
    plan: Plan,
    rows: TokenRows | None,
    dtype: torch.dtype,
    order: Order,
    writer: CheckpointWriter | None,
    journal: Journal,
    clock: Clock,
    progress: Progress,
    on_disk: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[list[LayerReport], list[str]]:
    """Compress and write every block of ``plan``; returns the layers' reports and notes for the user.

    ``rows`` are used only if the recipe gathers statistics; blocks compute in ``dtype``. Goes on from the state in
    ``journal``, if there is one, and saves it there between blocks. With ``on_disk`` hidden states are kept in the
    journal's folder, and one micro-batch is in memory at a time; the result is the same. A continued run keeps them
    where they are. Each of ``ranks`` runs some of the rows, all solve, and the first one has the ``writer``.

    Raises:
        CalibrantError: values are not finite, or the recipe does not support the model.
        StoppedError: a signal asked to stop; the state is saved.
    """
    with clock.stage("embed"):
        given = rows if plan.recipe.gathers else None
        beside = plan.recipe.beside_original
        on_disk = bool(saved_numbers(journal.folder, NAME).get(ON_DISK, on_disk))
        states = journal.folder / f"{STATES}-{ranks.rank}" if on_disk else None
        walk = BlockWalk(model, plan.blocks, given, dtype, beside, states, ranks)
    checkpoints = BlockCheckpoints(journal, walk, writer, clock)
    checkpoints.restore()
    count, done = len(plan.blocks), checkpoints.done
    if done:
        progress.note(f"continues after block {done} of {count}, from {journal.folder}")
    compression = _Compression(walk, plan, order, clock, checkpoints.notes, ranks)
    with progress.task("compressing", count, "blocks") as task:
        if done:
            task.advance(done)
        for index in range(done, count):
            solver = compression.compress(index)
            if writer is not None:
                with clock.stage("write"):
                    writer.write_block(solver)
            checkpoints.layers += solver.layers
            return_freed_memory()
            checkpoints.block_done()
            task.advance()
            if any(ranks.collect(stop_requested())) and index + 1 < count:
                checkpoints.save()
                raise stopped(f"block {index + 1} of {count}")
    if plan.recipe.distillation is not None and done < count:  # it may take longer than the blocks
        checkpoints.save()
        check_stop(f"block {count} of {count}")
    shares = [layer.reconstructed for layer in checkpoints.layers if layer.reconstructed is not None]
    if shares:
        fallen = 1 - sum(shares) / len(shares)
        compression.note(f"reconstruction lowered the blocks' error on held-out rows by {fallen:.1%} on average")
    return checkpoints.layers, compression.notes


class _Compression:
    """State shared by the blocks of one run; ``notes`` are for the user."""

    def __init__(self, walk: BlockWalk, plan: Plan, order: Order, clock: Clock, notes: list[str], ranks: Ranks) -> None:
        self._walk, self._plan, self._order, self._clock, self.notes = walk, plan, order, clock, notes
        self._ranks = ranks

    def compress(self, index: int) -> BlockSolver:
        """Solve block ``index`` and advance the batches to the next block."""
        try:
            with self._opened(index) as (solver, structure, outputs), self._clock.stage("forward"):
                self._solve(solver, structure, outputs)
                return solver
        except OrderDiffersError as difference:
            where = f"{self._plan.blocks[index]}: sequences reach {difference} in different orders"
            if self._plan.recipe.beside_original:
                raise CalibrantError(f"{where}, so {_NO_ORIGINAL}") from difference
            if not difference.intact or not self._ranks.alone:
                raise CalibrantError(f'{where}; run again with `order="two-pass"`') from difference
            self.notes.append(f"{where}, solved in two passes")
        with self._opened(index) as (solver, structure, _), self._clock.stage("forward"):
            self._solve_in_two_passes(solver, structure, propagate=True)
            return solver

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[BlockSolver, BlockStructure, Sequence[torch.Tensor]]]:
        """A solver for block ``index``, the stages to solve, and the outputs if transforms computed them."""
        plan = self._plan

        def ignored(name: str) -> bool:
            return plan.leaves(f"{plan.blocks[index]}.{name}")

        with ExitStack() as stack:
            with self._clock.stage("load"):
                block = stack.enter_context(self._walk.opened(index))
            if block.structure.unseen:
                unseen = ", ".join(block.structure.unseen)
                if plan.fused_layout is not None:
                    raise CalibrantError(
                        f"{block.name}: of {unseen} no product with one expert was seen, and no loader takes dense "
                        "experts beside packed ones; ignore them, then the model is stored dense"
                    )
                self.note(f"{block.name}: {unseen} left as they are, no product with one expert was seen")
            for text in block.structure.partly(lambda name: plan.recipe.ignores(f"{plan.blocks[index]}.{name}")):
                self.note(text)
            solver = BlockSolver(block, plan, self._clock, self._ranks)
            outputs: Sequence[torch.Tensor] = ()
            if plan.recipe.transforms and (block.batches or plan.learned.scales is not None):
                with self._clock.stage("transform"):
                    done = transform_block(block, plan, self._ranks)
                solver.solved_parameters |= done.changed
                outputs = done.outputs
                for text in done.notes:
                    self.note(text)
            yield solver, block.structure.without(ignored), outputs

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _solve(self, solver: BlockSolver, structure: BlockStructure, outputs: Sequence[torch.Tensor]) -> None:
        block = solver.block
        if not self._plan.recipe.solves_with_data:
            for linear in structure.linears():
                solver.solve((linear,))
            if not all(bool(torch.isfinite(output).all()) for output in outputs):
                raise CalibrantError(
                    f"{block.name}: its output contains values that are not finite; compute in float32 "
                    '(`dtype="float32"`) or check the model'
                )
            if len(outputs):
                block.advance(outputs)
        elif self._plan.recipe.beside_original:
            self._solve_beside_original(solver, structure)
        elif self._order == "sequential" and structure.recurring:
            name = min(structure.recurring)
            self.note(f"{name} runs several times in a pass: blocks with such a layer are solved in two passes")
            self._solve_in_two_passes(solver, structure, propagate=True)
        elif self._order == "sequential":
            with solver.observing_caches():
                block.advance(sequential_pass(block, structure, solver)[0])
        else:
            self._solve_in_two_passes(solver, structure, propagate=self._order == "two-pass")

    @staticmethod
    def _solve_in_two_passes(solver: BlockSolver, structure: BlockStructure, propagate: bool) -> None:
        outputs = two_passes(solver.block, structure, solver)
        cached = solver.plan.recipe.scheme.kv_cache is not None
        with solver.observing_caches():
            if propagate:
                solver.block.advance()
            elif cached:
                for batch in solver.block.batches:
                    solver.block.run(batch)
        if not propagate:
            solver.block.advance(outputs)

    def _solve_beside_original(self, solver: BlockSolver, structure: BlockStructure) -> None:
        block = solver.block
        if any(isinstance(stage, Experts) for stage in structure.stages):
            raise CalibrantError(f"{block.name}: its experts are fused, so {_NO_ORIGINAL}")
        if structure.recurring:
            name = min(structure.recurring)
            raise CalibrantError(f"{block.name}: {name} runs several times in a pass, so {_NO_ORIGINAL}")
        # Copied before the caches are watched: a copy has the hooks too.
        original = copy.deepcopy(block.module)
        options = self._plan.recipe.reconstruction
        if options is None:
            with solver.observing_caches():
                outputs, originals = sequential_pass(block, structure, solver, original=original)
            block.advance(outputs, originals)
            return
        # The pass empties the tensors of states in memory; these share their values.
        states = [batch.hidden.detach() for batch in block.batches] if isinstance(block.batches, list) else []
        originals = sequential_pass(block, structure, solver, original=original, to_end=False)[1]
        del original
        for batch, hidden in zip(block.batches, states, strict=False):
            batch.hidden = hidden
        with self._clock.stage("reconstruct"):
            share = reconstruct(solver, structure, originals, options)
        solver.layers = [replace(layer, reconstructed=share) for layer in solver.layers]
        with solver.observing_caches():
            block.advance(None, originals)
