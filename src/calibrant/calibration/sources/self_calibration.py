"""Self-calibration: the model writes its own calibration text from BOS alone (arXiv 2410.17170 §3; methods.md §24)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.calibration.randomness import generator
from calibrant.calibration.tokenizer import Tokenizer
from calibrant.errors import CalibrantError
from calibrant.modeling.decoding import Decoder, prepare_decoding
from calibrant.progress import Progress

# Below this a division would overflow the logits, and the distribution is a point mass anyway (ours).
_ARGMAX_BELOW = 1e-4
_BLOCK = 64


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperatures of a generation: linear from ``initial`` to ``final`` over ``steps`` steps, then ``final``.

    ``t_i = initial + (i / steps) (final - initial)`` for ``i <= steps`` (paper §3.2); ``steps = 0`` is constant.
    """

    initial: float = 1.0
    final: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.initial < math.inf and 0 <= self.final < math.inf and self.steps >= 0):
            raise CalibrantError("temperatures must be finite, and like temperature steps not negative")

    def table(self, length: int) -> torch.Tensor:
        """Temperatures of steps 1 ... ``length`` as float64 ``[length]``."""
        step = torch.arange(1, length + 1, dtype=torch.float64)
        share = torch.clamp(step / self.steps, max=1.0) if self.steps else torch.ones(length, dtype=torch.float64)
        return self.initial + share * (self.final - self.initial)


def generate_self_calibration(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    draw: int,
    schedule: TemperatureSchedule,
    batch_size: int,
    progress: Progress,
    provenance: dict[str, str],
) -> CalibrationSet:
    """Let ``model`` write ``samples`` rows of exactly ``length`` tokens.

    A row starts with BOS; when the model writes EOS a new, independent generation begins with BOS in the same row
    (EOS and BOS stay in the row and count), until the row is full. No top-k, top-p or penalty. Row ``i`` draws from
    its own generator, so the text of a row does not depend on the batch it was generated in, up to the
    floating-point differences of matrix products of different size. ``provenance`` is recorded in the manifest.
    """
    uniforms = np.stack([generator(seed, "self", draw, row).random(length) for row in range(samples)])
    rows: list[torch.Tensor] = []
    counts = {"generations": samples}
    with progress.task("generating", samples * length) as task, torch.inference_mode():
        make_decoder = prepare_decoding(model)
        for begin in range(0, samples, batch_size):
            chunk = torch.from_numpy(uniforms[begin : begin + batch_size]).to(model.device)
            for column in _generate(model, make_decoder, tokenizer, chunk, schedule, rows, counts):
                task.advance(column)
    tokens = torch.cat(rows).to(torch.int32)
    manifest = Manifest(
        strategy="self",
        parameters={
            "temperature_initial": schedule.initial,
            "temperature_final": schedule.final,
            "temperature_steps": schedule.steps,
            "batch_size": batch_size,
            "start_token": tokenizer.start_id,
            "device": model.device.type,
            "compute_dtype": str(model.dtype).removeprefix("torch."),
        },
        seed=seed,
        draw=draw,
        samples=samples,
        length=length,
        tokenizer_sha256=tokenizer.sha256,
        model=dict(provenance),
        counts=counts,
    )
    return CalibrationSet.build(tokens, torch.ones_like(tokens, dtype=torch.bool), manifest)


def _generate(
    model: transformers.PreTrainedModel,
    make_decoder: Callable[[int, int], Decoder],
    tokenizer: Tokenizer,
    uniforms: torch.Tensor,
    schedule: TemperatureSchedule,
    rows: list[torch.Tensor],
    counts: dict[str, int],
) -> Iterator[int]:
    """Fill one batch column by column; yields the number of tokens of each finished column."""
    batch, length = uniforms.shape
    device = uniforms.device
    ends = torch.tensor(sorted(_end_ids(model, tokenizer)), device=device)
    decoder = make_decoder(batch, length)
    temperatures = schedule.table(length).to(device)
    tokens = torch.full((batch, length), tokenizer.start_id, dtype=torch.long, device=device)
    position = torch.zeros(batch, dtype=torch.long, device=device)
    yield batch
    for column in range(1, length):
        previous = tokens[:, column - 1]
        logits = decoder.step(previous, position)
        chosen = _sample(logits, temperatures[position], uniforms[:, column])
        # A row whose last token ended its text starts over: BOS next, nothing before it attended.
        ended = torch.isin(previous, ends) & (position > 0)
        counts["generations"] += int(ended.sum())
        tokens[:, column] = torch.where(ended, tokenizer.start_id, chosen)
        position = torch.where(ended, 0, position + 1)
        yield batch
    rows.append(tokens.cpu())


def _end_ids(model: transformers.PreTrainedModel, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends a text: the tokenizer's EOS and those of the model's generation settings."""
    ends = {int(tokenizer.hf.eos_token_id)} if tokenizer.hf.eos_token_id is not None else set()
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(isinstance(end, int) for end in listed):
        raise CalibrantError(f"the model's generation settings name {configured!r} as eos_token_id, which is no id")
    return ends | set(listed)


def _sample(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One id a row by inverse distribution function.

    ``logits`` float32 ``[rows, vocabulary]``; ``temperature`` and ``uniform`` float64 ``[rows]``.
    """
    greedy = temperature < _ARGMAX_BELOW
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None].float()
    # The sum runs over blocks first, then inside the one that is hit: a sixtieth of the additions in float64.
    shares = torch.softmax(scaled, dim=-1)
    if shares.shape[-1] % _BLOCK:
        shares = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % _BLOCK))
    shares = shares.view(len(logits), -1, _BLOCK)
    blocks = shares.sum(-1).double().cumsum(-1)
    if not bool(torch.isfinite(blocks[:, -1]).all()):
        raise CalibrantError("the model gives numbers that are not finite; compute in float32 or check its weights")
    threshold = (uniform * blocks[:, -1])[:, None]
    block = torch.searchsorted(blocks, threshold, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = shares.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    place = torch.searchsorted(inside, threshold - before, right=True).clamp(max=_BLOCK - 1)
    index = (block * _BLOCK + place)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy, logits.argmax(dim=-1), index) if bool(greedy.any()) else index
