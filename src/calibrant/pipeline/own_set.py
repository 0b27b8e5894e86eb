"""The calibration set of a run that got none: text of the model itself, as far as memory lets it write."""

from dataclasses import dataclass

import torch

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import BUILTIN
from calibrant.calibration.generate import generate
from calibrant.calibration.select import select
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.pipeline.memory import resident_memory
from calibrant.progress import Progress

# Rows that are written at a time where memory allows it.
_BATCH_SIZE = 64


@dataclass(frozen=True)
class SetSize:
    """Size, seed and draw of the calibration set that the model generates if none is given."""

    samples: int
    length: int
    seed: int
    draw: int


def own_set(
    folder: ModelFolder, size: SetSize, dtype: torch.dtype, device: torch.device, memory: int, progress: Progress
) -> CalibrationSet:
    """Text that the model writes, in smaller batches where ``memory`` bytes are too few for the usual ones.

    Where the model and one row do not fit, the set is drawn from the built-in corpus instead, and a note says so.
    """
    batch_size = _fitting_rows(folder, size, dtype, memory)
    if batch_size == 0:
        progress.note(
            f"the model needs {_model_bytes(folder, dtype) / 1e9:.1f} GB to write its calibration set, and "
            f"{memory / 1e9:.1f} GB may be used: the set is drawn from the built-in corpus; give text of yours "
            "as `calibration`"
        )
        return select(
            BUILTIN, tokenizer=folder.path, samples=size.samples, length=size.length, seed=size.seed, draw=size.draw,
            progress=progress,
        )  # fmt: skip
    return generate(
        folder.path,
        samples=size.samples,
        length=size.length,
        seed=size.seed,
        draw=size.draw,
        batch_size=batch_size,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        dequantize=folder.decoded,
        progress=progress,
    )


def _fitting_rows(folder: ModelFolder, size: SetSize, dtype: torch.dtype, memory: int) -> int:
    """How many rows can be written at a time, a power of two; 0 if the model does not fit."""
    text = vars(folder.config.get_text_config())
    heads = text.get("num_attention_heads") or 1
    width = text.get("head_dim") or text["hidden_size"] // heads
    keys = text.get("num_key_value_heads") or heads
    per_token = 2 * keys * width * text.get("num_hidden_layers", 1) * torch.empty(0, dtype=dtype).element_size()
    free = memory - resident_memory() - _model_bytes(folder, dtype)
    rows = _BATCH_SIZE
    while rows and rows * size.length * per_token > free:
        rows //= 2
    return rows


def _model_bytes(folder: ModelFolder, dtype: torch.dtype) -> int:
    numbers = sum(torch.Size(info.shape).numel() for info in folder.tensors.values())
    return numbers * torch.empty(0, dtype=dtype).element_size()
