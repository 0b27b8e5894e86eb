"""What a study takes, before anything runs: time, memory and disk."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace

import torch

from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.pipeline.estimate import measured_rate
from calibrant.pipeline.own_set import SetSize
from calibrant.pipeline.prepare import PreparedRun
from calibrant.pipeline.writing_cost import SPREAD
from calibrant.progress import Progress
from calibrant.study.cache import Cache
from calibrant.study.cells import Cell
from calibrant.study.resolve import CellWork, Resolved
from calibrant.study.set_seconds import set_seconds
from calibrant.study.steps import OriginalStep, Yardstick

# An int32 token id and its mask.
_SET_BYTES = 5
# Opening a model to measure it, and what attention and norms take beside products of matrices.
_OPENING_SECONDS, _BESIDE_PRODUCTS = 1.0, 1.5
# Tokens of an item with its choices, and items of a task, roughly (ours): they differ tenfold between tasks.
_TASK_TOKENS, _TASK_ITEMS = 100, 2000
# A whole model in float32, and the copy that its loading makes of the largest part.
_MEASURING_BYTES = 4 * 1.3


@dataclass(frozen=True)
class StudyEstimate:
    """A checked study.

    ``seconds`` are the least and the most to expect of the cells that are not ``done``, and of making ``sets`` sets;
    ``memory_bytes`` are of all workers together, ``disk_bytes`` those of the cache.
    """

    models: int
    recipes: int
    sources: int
    draws: int
    cells: int
    done: int
    sets: int
    seconds: tuple[float, float]
    memory_bytes: int
    disk_bytes: int


def estimate_study(
    resolved: Resolved, finished: set[Cell], cache: Cache, workers: int, progress: Progress
) -> StudyEstimate:
    """Estimate the cells that are not ``finished``, and whose results are not in the cache.

    Raises:
        CalibrantError: the disk has not enough room.
    """
    left = _left(resolved, finished, cache)
    kinds = Counter((one.cell.model, one.cell.recipe, one.cell.samples, one.cell.length) for one in left)
    rate = measured_rate(torch.float32, torch.device(resolved.plan.device))
    least = most = 0.0
    memory = 0
    with progress.task("estimating", len(kinds), "compressions") as task:
        for (model, recipe, samples, length), count in kinds.items():
            prepared = resolved.prepared[model, recipe]
            found = replace(
                prepared, own_set=SetSize(samples, length, resolved.plan.seeds[0], 0)
            ).compression_estimate()
            weights = _parameters(prepared.model.folder)
            measuring = sum(_measuring_seconds(one, weights, rate) for one in resolved.yardsticks(model).values())
            least += count * (found.seconds_range[0] + measuring)
            most += count * (found.seconds_range[1] + measuring)
            memory = max(memory, found.memory_bytes, int(_MEASURING_BYTES * weights))
            task.advance()
    unmade = {work.set_step.key: work for work in left if not work.set_step.is_done(cache)}
    for work in unmade.values():
        prepared = resolved.prepared[work.cell.model, work.cell.recipe]
        making = set_seconds(work.set_step, prepared, _parameters(prepared.model.folder), rate)
        least, most = least + making / SPREAD, most + making * SPREAD
    return StudyEstimate(
        models=len(resolved.models),
        recipes=len(resolved.recipes),
        sources=len(resolved.plan.sources),
        draws=resolved.plan.draws,
        cells=len(resolved.cells),
        done=sum(work.cell in finished or work.step.is_done(cache) for work in resolved.cells),
        sets=len(unmade),
        seconds=(least, most),
        memory_bytes=workers * memory,
        disk_bytes=check_disk(resolved, finished, cache, workers),
    )


def check_disk(resolved: Resolved, finished: set[Cell], cache: Cache, workers: int) -> int:
    """Bytes of disk in the cache that the cells take which are not ``finished``.

    Raises:
        CalibrantError: there is not enough room, or the folder cannot be written.
    """
    left = _left(resolved, finished, cache)
    most = kept = 0
    for work in left:
        prepared = resolved.prepared[work.cell.model, work.cell.recipe]
        output, running = prepared.disk_bytes()
        most = max(most, running)
        kept += output if resolved.plan.keep_outputs else 0
    sets = {work.set_step.key: work.set_step for work in left}
    wanted = workers * most + kept + sum(_SET_BYTES * one.samples * one.length for one in sets.values())
    wanted += sum(_state_bytes(one, prepared) for one, prepared in _unstored(left, resolved, cache))
    place = next(path for path in (cache.folder, *cache.folder.parents) if path.exists())
    if not os.access(place, os.W_OK):
        raise CalibrantError(f"{cache.folder}: cannot be written; choose another folder with `cache`")
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise CalibrantError(
            f"{cache.folder}: the study needs about {wanted / 1e6:,.1f} MB of disk, {free / 1e6:,.1f} MB are free; "
            "free some, or choose another folder with `cache`"
        )
    return wanted


def _left(resolved: Resolved, finished: set[Cell], cache: Cache) -> list[CellWork]:
    """The cells without results, once for each compression."""
    missing = [work for work in resolved.cells if work.cell not in finished and not work.step.is_done(cache)]
    return list({work.step.key: work for work in missing}.values())


def _measuring_seconds(yardstick: Yardstick, weights: int, rate: float) -> float:
    if isinstance(yardstick, OriginalStep):
        tokens = yardstick.text.most_tokens
    else:
        tokens = _TASK_TOKENS * (yardstick.limit or _TASK_ITEMS)
    return _OPENING_SECONDS + _BESIDE_PRODUCTS * 2.0 * weights * tokens / rate


def _unstored(left: list[CellWork], resolved: Resolved, cache: Cache) -> list[tuple[OriginalStep, PreparedRun]]:
    found = {
        one.key: (one, resolved.prepared[work.cell.model, work.cell.recipe])
        for work in left
        for one in work.yardsticks.values()
        if isinstance(one, OriginalStep) and not one.is_done(cache)
    }
    return list(found.values())


def _state_bytes(original: OriginalStep, prepared: PreparedRun) -> int:
    width = int(prepared.model.folder.config.get_text_config().hidden_size)
    return 4 * width * original.text.most_tokens


def _parameters(folder: ModelFolder) -> int:
    return sum(torch.Size(info.shape).numel() for info in folder.tensors.values())
