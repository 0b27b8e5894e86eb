"""Rows of text that a model writes in batches, each row from its own random numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import transformers

from calibrant.errors import CalibrantError
from calibrant.modeling.decoding import Decoder, prepare_decoding
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress

# Below this, the division would overflow the logits, and the distribution is a point mass anyway (ours).
_ARGMAX_BELOW = 1e-4
_BLOCK = 64


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperatures: float64, ``[length]`` for all rows or ``[rows, length]``. Entry ``i`` is for the token that is
            ``i`` behind a text's given beginning; 0 takes the most likely token.
        first_ids: int64, the only ids that may follow a text's given beginning; None allows all.
        top_k: as in transformers; None is off.
        top_p: as in transformers; 1 is off.
        repetition_penalty: as in transformers, over the row's current text; 1 is off.
    """

    temperatures: torch.Tensor
    first_ids: torch.Tensor | None = None
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Written:
    """Rows that a model wrote.

    Attributes:
        tokens: int32 ``[rows, length]``.
        losses: mean negative log-likelihood of each row's sampled tokens, in nats, at temperature 1.
        starts: the positions in each row where its texts begin.
    """

    tokens: torch.Tensor
    losses: list[float]
    starts: list[list[int]]

    @property
    def generations(self) -> int:
        """Number of texts that were begun."""
        return sum(map(len, self.starts))


class KeptRows(Protocol):
    """Rows that outlive the process that writes them."""

    def read(self, first: int, count: int) -> Written | None:
        """The rows from number ``first``, if exactly so many were kept together."""

    def write(self, first: int, rows: Written) -> None:
        """Keep ``rows`` from number ``first``."""


def write_rows(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    uniforms: np.ndarray,
    beginning: Callable[[int, int], Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    progress: Progress,
    kept: KeptRows | None = None,
) -> Written:
    """Let ``model`` fill rows with texts: where one ends, the next begins in the same row without seeing it.

    Args:
        model: the writer; afterwards it can only decode.
        tokenizer: names the ids that end a text, together with the model's generation settings.
        uniforms: float64 ``[rows, length]`` in [0, 1). They decide every draw, so a row does not depend on its batch,
            up to the floating-point differences of matrix products of different size.
        beginning: ``beginning(row, n)`` gives the first tokens, at least one, of text ``n`` of a row.
        sampling: how the other tokens are drawn.
        batch_size: rows that are written at a time.
        progress: receives the progress.
        kept: has the rows that an interrupted call has written, and gets those of this one.

    Raises:
        CalibrantError: the model's logits are not finite, or its generation settings are unusable.
    """
    rows, length = uniforms.shape
    ends = torch.tensor(sorted(end_ids(model, tokenizer)), device=model.device)
    parts: list[Written] = []
    with progress.task("generating", rows * length, "tokens") as task, torch.inference_mode():
        make_decoder = prepare_decoding(model)
        for first in range(0, rows, batch_size):
            drawn = torch.from_numpy(uniforms[first : first + batch_size])
            known = kept.read(first, len(drawn)) if kept is not None else None
            if known is not None:
                parts.append(known)
                task.advance(drawn.numel())
                continue
            batch = _Batch(drawn, first, beginning, sampling, ends)
            decoder = make_decoder(*batch.tokens.shape)
            task.advance(len(batch.tokens))
            for column in range(1, length):
                batch.write(column, decoder)
                task.advance(len(batch.tokens))
            losses = (batch.loss / batch.sampled.clamp(min=1)).tolist()
            parts.append(Written(batch.tokens.cpu().to(torch.int32), losses, batch.starts))
            if kept is not None:
                kept.write(first, parts[-1])
    return Written(
        torch.cat([part.tokens for part in parts]),
        [loss for part in parts for loss in part.losses],
        [starts for part in parts for starts in part.starts],
    )


@dataclass
class _Batch:
    """Rows that are written together, column by column."""

    uniforms: torch.Tensor
    first_row: int
    beginning: Callable[[int, int], Sequence[int]]
    sampling: Sampling
    ends: torch.Tensor
    tokens: torch.Tensor = field(init=False)
    starts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        rows, length = self.uniforms.shape
        device = self.ends.device
        self.uniforms = self.uniforms.to(device)
        self.tokens = torch.zeros((rows, length), dtype=torch.long, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.given = torch.zeros(rows, dtype=torch.long, device=device)
        self.loss = torch.zeros(rows, dtype=torch.float64, device=device)
        self.sampled = torch.zeros(rows, dtype=torch.long, device=device)
        self.starts = [[] for _ in range(rows)]
        self.pending: dict[int, list[int]] = {}
        table = self.sampling.temperatures
        own = table[self.first_row : self.first_row + rows] if table.ndim == 2 else table.expand(rows, -1)
        self.temperatures = own.to(device)
        for row in range(rows):
            self._begin(row, 0)

    def _begin(self, row: int, column: int) -> None:
        first, *rest = self.beginning(self.first_row + row, len(self.starts[row]))
        self.tokens[row, column] = first
        self.position[row] = 0
        self.given[row] = 1 + len(rest)
        self.starts[row].append(column)
        if rest:
            self.pending[row] = rest

    def write(self, column: int, decoder: Decoder) -> None:
        """Fill one column."""
        previous = self.tokens[:, column - 1]
        logits = decoder.step(previous, self.position)
        ended = torch.isin(previous, self.ends) & (self.position >= self.given)
        step = (self.position + 1 - self.given).clamp(min=0)
        temperature = self.temperatures.gather(1, step[:, None])[:, 0]
        chosen = sample(self._adjusted(logits, column, temperature), temperature, self.uniforms[:, column])
        free = ~ended & (self.position + 1 >= self.given)
        surprise = logits.logsumexp(-1) - logits.gather(1, chosen[:, None])[:, 0]
        self.loss += torch.where(free, surprise.double(), 0.0)
        self.sampled += free
        self.tokens[:, column] = chosen
        self.position += 1
        for row, rest in list(self.pending.items()):
            self.tokens[row, column] = rest.pop(0)
            if not rest:
                del self.pending[row]
        for row in torch.nonzero(ended)[:, 0].tolist():
            self._begin(row, column)

    def _adjusted(self, logits: torch.Tensor, column: int, temperature: torch.Tensor) -> torch.Tensor:
        """Logits after penalty and restrictions, in transformers' order."""
        rule = self.sampling
        if rule.repetition_penalty != 1.0:
            logits = self._penalized(logits, column)
        if rule.first_ids is not None:
            starts = self.position + 1 == self.given
            allowed = torch.full_like(logits[0], -math.inf)
            allowed[rule.first_ids.to(logits.device)] = 0
            logits = torch.where(starts[:, None], logits + allowed, logits)
        if rule.top_k is not None:
            least = logits.topk(min(rule.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if rule.top_p < 1.0:
            logits = _nucleus(logits, rule.top_p, temperature[:, None])
        return logits

    def _penalized(self, logits: torch.Tensor, column: int) -> torch.Tensor:
        """Divide the logits of tokens in a row's current text by the penalty; multiply negative ones."""
        own = torch.arange(column, device=logits.device) >= (column - 1 - self.position)[:, None]
        seen = self.tokens[:, :column]
        scores = logits.gather(1, seen)
        penalty = self.sampling.repetition_penalty
        lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
        return logits.scatter(1, torch.where(own, seen, seen[:, -1:]), torch.where(own, lowered, lowered[:, -1:]))


def _nucleus(logits: torch.Tensor, share: float, temperature: torch.Tensor) -> torch.Tensor:
    """Logits of the most likely tokens that together reach ``share``; all others are minus infinity."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    chances = torch.softmax(logits / temperature.clamp(min=_ARGMAX_BELOW).float(), -1).gather(1, order)
    beyond = chances.double().cumsum(-1) - chances >= share
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)


def end_ids(model: transformers.PreTrainedModel, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends a text: the tokenizer's EOS and those of the model's generation settings.

    Raises:
        CalibrantError: an end in the settings is no id.
    """
    ends = {int(tokenizer.hf.eos_token_id)} if tokenizer.hf.eos_token_id is not None else set()
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(isinstance(end, int) for end in listed):
        raise CalibrantError(f"the model's generation settings have {configured!r} as eos_token_id, which is no id")
    return ends | set(listed)


def sample(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one id per row by the inverse distribution function; int64 ``[rows]``.

    ``logits`` are float32 ``[rows, vocabulary]``, ``temperature`` and ``uniform`` float64 ``[rows]``.

    Raises:
        CalibrantError: the logits are not finite.
    """
    greedy = temperature < _ARGMAX_BELOW
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None].float()
    # Summing blocks first, then inside the block that is hit, saves all but a sixtieth of the float64 additions.
    shares = torch.softmax(scaled, dim=-1)
    if shares.shape[-1] % _BLOCK:
        shares = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % _BLOCK))
    shares = shares.view(len(logits), -1, _BLOCK)
    blocks = shares.sum(-1).double().cumsum(-1)
    if not bool(torch.isfinite(blocks[:, -1]).all()):
        raise CalibrantError('the model\'s logits are not finite; use `dtype="float32"` or check its weights')
    threshold = (uniform * blocks[:, -1])[:, None]
    block = torch.searchsorted(blocks, threshold, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = shares.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    place = torch.searchsorted(inside, threshold - before, right=True).clamp(max=_BLOCK - 1)
    index = (block * _BLOCK + place)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy, logits.argmax(dim=-1), index) if bool(greedy.any()) else index


def compute_place(model: transformers.PreTrainedModel) -> dict[str, str]:
    """Device and dtype in which ``model`` writes, as manifests record them."""
    return {"device": model.device.type, "compute_dtype": str(model.dtype).removeprefix("torch.")}
