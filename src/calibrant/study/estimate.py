"""What a study takes, before anything runs: time, memory and disk."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.pipeline.estimate import measured_rate
from calibrant.pipeline.prepare import PreparedRun, SetSize
from calibrant.progress import Progress
from calibrant.study.cache import Cache
from calibrant.study.resolve import CellWork, Resolved
from calibrant.study.steps import OriginalStep, Yardstick

# Opening a model to measure it, and what attention and norms take beside products of matrices.
_OPENING_SECONDS, _BESIDE_PRODUCTS = 1.0, 1.5
# Tokens of an item with its choices, and items of a task, roughly (ours): they differ tenfold between tasks.
_TASK_TOKENS, _TASK_ITEMS = 100, 2000
# A whole model in float32, and the copy that its loading makes of the largest part.
_MEASURING_BYTES = 4 * 1.3


@dataclass(frozen=True)
class StudyEstimate:
    """A checked study.

    ``seconds`` are the least and the most to expect of the cells that are not ``done``, without making ``sets`` sets;
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


def estimate_study(resolved: Resolved, cache: Cache, workers: int, progress: Progress) -> StudyEstimate:
    """Estimate the cells whose results are not in the cache.

    Raises:
        CalibrantError: the disk has not enough room.
    """
    left = {work.step.key: work for work in resolved.cells if not work.step.is_done(cache)}
    kinds = Counter((one.cell.model, one.cell.recipe, one.cell.samples, one.cell.length) for one in left.values())
    rate = measured_rate(torch.float32, torch.device(resolved.plan.device))
    least = most = 0.0
    memory, disk, kept = 0, 0, 0
    with progress.task("estimating", len(kinds)) as task:
        for (model, recipe, samples, length), count in kinds.items():
            prepared = resolved.prepared[model, recipe]
            found = replace(prepared, own_set=SetSize(samples, length, resolved.plan.seeds[0], 0)).estimate()
            weights = _parameters(prepared.model.folder)
            measuring = sum(_measuring_seconds(one, weights, rate) for one in resolved.yardsticks(model).values())
            least += count * (found.seconds_range[0] + measuring)
            most += count * (found.seconds_range[1] + measuring)
            memory = max(memory, found.memory_bytes, int(_MEASURING_BYTES * weights))
            disk = max(disk, found.disk_bytes)
            kept += count * found.output_bytes if resolved.plan.keep_outputs else 0
            task.advance()
    sets = {work.set_step.key: work.set_step for work in left.values()}
    disk = workers * disk + kept + sum(5 * one.samples * one.length for one in sets.values())
    disk += sum(_state_bytes(one, prepared) for one, prepared in _unstored(left, resolved, cache))
    _check_disk(cache.folder, disk)
    return StudyEstimate(
        models=len(resolved.models),
        recipes=len(resolved.recipes),
        sources=len(resolved.plan.sources),
        draws=resolved.plan.draws,
        cells=len(resolved.cells),
        done=sum(work.step.key not in left for work in resolved.cells),
        sets=sum(not one.is_done(cache) for one in sets.values()),
        seconds=(least, most),
        memory_bytes=workers * memory,
        disk_bytes=disk,
    )


def _measuring_seconds(yardstick: Yardstick, weights: int, rate: float) -> float:
    if isinstance(yardstick, OriginalStep):
        tokens = yardstick.text.windows * yardstick.text.length
    else:
        tokens = _TASK_TOKENS * (yardstick.limit or _TASK_ITEMS)
    return _OPENING_SECONDS + _BESIDE_PRODUCTS * 2.0 * weights * tokens / rate


def _unstored(left: dict[str, CellWork], resolved: Resolved, cache: Cache) -> list[tuple[OriginalStep, PreparedRun]]:
    found = {
        one.key: (one, resolved.prepared[work.cell.model, work.cell.recipe])
        for work in left.values()
        for one in work.yardsticks.values()
        if isinstance(one, OriginalStep) and not one.is_done(cache)
    }
    return list(found.values())


def _state_bytes(original: OriginalStep, prepared: PreparedRun) -> int:
    width = int(prepared.model.folder.config.get_text_config().hidden_size)
    return 4 * width * original.text.windows * original.text.length


def _parameters(folder: ModelFolder) -> int:
    return sum(torch.Size(info.shape).numel() for info in folder.tensors.values())


def _check_disk(folder: Path, wanted: int) -> None:
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(place, os.W_OK):
        raise CalibrantError(f"{folder}: cannot be written; choose another folder with `cache`")
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise CalibrantError(
            f"{folder}: the study needs about {wanted / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; "
            "free some, or choose another folder with `cache`"
        )
