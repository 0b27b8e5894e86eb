"""The calibration set of a run that got none: text of the model itself, as far as memory lets it write."""

from dataclasses import dataclass

import torch

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import BUILTIN
from calibrant.calibration.select import select
from calibrant.calibration.sources.kept_rows import ROWS, RowsInJournal
from calibrant.calibration.sources.self_calibration import TemperatureSchedule, generate_self_calibration
from calibrant.journal import Journal
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.pipeline.estimate import measured_rate
from calibrant.pipeline.memory import resident_memory
from calibrant.pipeline.writing_cost import BATCH_SIZE, cache_bytes, writing_seconds
from calibrant.progress import Progress


@dataclass(frozen=True)
class SetSize:
    """Size, seed and draw of the calibration set that the model generates if none is given."""

    samples: int
    length: int
    seed: int
    draw: int


def own_set(
    folder: ModelFolder,
    size: SetSize,
    dtype: torch.dtype,
    device: torch.device,
    memory: int,
    journal: Journal,
    progress: Progress,
) -> CalibrationSet:
    """Text that the model writes, in smaller batches where ``memory`` bytes are too few for the usual ones.

    Where the model and one row do not fit, the set is drawn from the built-in corpus instead (``corpus_note``).
    Written rows stay in ``journal`` until ``forget_rows``.

    Raises:
        StoppedError: a signal asked to stop; the rows so far are kept.
    """
    batch_size = _fitting_rows(folder, size, dtype, memory) if device.type == "cpu" else BATCH_SIZE
    if batch_size == 0:
        return select(
            BUILTIN, tokenizer=folder.path, samples=size.samples, length=size.length, seed=size.seed, draw=size.draw,
            progress=progress,
        )  # fmt: skip
    made = generate_self_calibration(
        load_whole(folder, str(device), str(dtype).removeprefix("torch.")),
        Tokenizer(folder.path),
        samples=size.samples,
        length=size.length,
        seed=size.seed,
        draw=size.draw,
        schedule=TemperatureSchedule(),
        first_tokens="any",
        batch_size=batch_size,
        progress=progress,
        provenance=folder.identity,
        kept=RowsInJournal(journal, f"{ROWS}-{size.samples}-{size.length}-{size.seed}-{size.draw}"),
    )
    return made.with_origin(str(folder.path), [])


def corpus_note(
    folder: ModelFolder, size: SetSize, dtype: torch.dtype, device: torch.device, memory: int
) -> str | None:
    """A sentence for the user if the model does not fit in ``memory`` bytes to write its set."""
    if device.type != "cpu" or _fitting_rows(folder, size, dtype, memory):
        return None
    return (
        f"the model needs {_model_bytes(folder, dtype) / 1e9:.1f} GB to write its calibration set, and "
        f"{memory / 1e9:.1f} GB may be used: the set is drawn from the built-in corpus; give text of yours "
        "as `calibration`"
    )


def own_set_cost(
    folder: ModelFolder, blocks: int, size: SetSize, dtype: torch.dtype, device: torch.device, memory: int
) -> tuple[float, int]:
    """Seconds of ``own_set`` and the bytes that it adds; those of a set from the built-in corpus are not counted."""
    batch_size = _fitting_rows(folder, size, dtype, memory) if device.type == "cpu" else BATCH_SIZE
    if batch_size == 0:
        return 0.0, 0
    weights, element = _numbers(folder), torch.empty(0, dtype=dtype).element_size()
    rate = measured_rate(dtype, device)
    seconds = writing_seconds(weights, blocks, size.samples, size.length, rate)
    rows = min(batch_size, size.samples)
    kept = rows * size.length * cache_bytes(folder, element)
    return seconds, _model_bytes(folder, dtype) + kept + 4 * rows * folder.vocabulary


def forget_rows(journal: Journal) -> None:
    """Remove the rows that ``own_set`` kept, once the set is saved."""
    journal.drop(f"{ROWS}-*")


def _fitting_rows(folder: ModelFolder, size: SetSize, dtype: torch.dtype, memory: int) -> int:
    """How many rows can be written at a time, a power of two; 0 if the model does not fit."""
    per_token = cache_bytes(folder, torch.empty(0, dtype=dtype).element_size())
    free = memory - resident_memory() - _model_bytes(folder, dtype)
    rows = BATCH_SIZE
    while rows and rows * size.length * per_token > free:
        rows //= 2
    return rows


def _model_bytes(folder: ModelFolder, dtype: torch.dtype) -> int:
    return _numbers(folder) * torch.empty(0, dtype=dtype).element_size()


def _numbers(folder: ModelFolder) -> int:
    return sum(torch.Size(info.shape).numel() for info in folder.tensors.values())
