"""lm-eval's Hugging Face model with another forward pass: requests that begin alike share it."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from calibrant.errors import CalibrantError
from calibrant.evaluation.tasks.batches import Sequences, batches, shared_prefixes
from calibrant.evaluation.tasks.definitions import quiet_lm_eval
from calibrant.modeling.losses import negative_log_likelihoods
from calibrant.modeling.tokenizer import Tokenizer

# Tokens of one forward pass: enough to keep the processor busy, few enough for its memory.
_MOST_TOKENS = {"cpu": 2048, "cuda": 16384}
_GENERATED_ROWS = {"cpu": 8, "cuda": 32}
_PROBE_PREFIX, _PROBE_REST = 7, (3, 5, 2)
# Limit of the mean deviation of the probe's logits, relative to their standard deviation.
_TOLERANCE = 0.05

Request = tuple[Any, list[int], list[int]]
Answer = tuple[float, bool]


class SharingModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """``HFLM`` on a loaded model: its tokenization, windows, truncation and generation, our log-likelihoods.

    Every distinct input runs once. Inputs that begin alike compute what they share once: its keys and values, or
    states, are then copied for the rest of each. The head computes only the positions that are scored. Where a probe of
    a few tokens shows that a model's states cannot be copied, or its head not be given single positions, that part is
    left out. ``truncated`` counts the requests that lost their beginning to the model's context.

    Log-likelihoods are float32, whatever the dtype of the model.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, tokenizer: Tokenizer, advance: Callable[[int], None]
    ) -> None:
        kind = model.device.type
        with quiet_lm_eval():
            super().__init__(pretrained=model, tokenizer=tokenizer.hf, batch_size=_GENERATED_ROWS[kind])
        self._most_tokens = _MOST_TOKENS[kind]
        embeddings: Any = model.get_input_embeddings()
        self._vocabulary = int(embeddings.weight.shape[0])
        self.advance = advance
        self.truncated = 0
        self._picks, self._shares = self._probe()

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Log-likelihood (nats) of each request's continuation, and whether every token of it is the most likely."""
        of_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise CalibrantError(
                    f"an answer of {len(continuation)} tokens is longer than the model's context of {self.max_length}"
                )
            whole = context + continuation
            self._check_ids(whole)
            self.truncated += len(whole) > self.max_length + 1
            of_input[tuple(whole[-(self.max_length + 1) :][:-1])].append(index)
        inputs = list(of_input)
        scored = [max(len(requests[index][2]) for index in of_input[tokens]) for tokens in inputs]
        groups = shared_prefixes(inputs, scored)
        if not self._shares:
            groups = [Sequences((row,), 0) for group in groups for row in group.rows]
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for row, logits in self._outputs(inputs, scored, groups):
            for index in of_input[inputs[row]]:
                answers[index] = _answer(logits, requests[index][2])
            self.advance(len(of_input[inputs[row]]))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """``HFLM``'s greedy generation, one batch of like lengths after the other."""
        lengths = []
        for request in requests:
            context, settings = request.args
            tokens = self.tok_encode(context)
            self._check_ids(tokens)
            most = int(normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])
            if most >= self.max_length:
                raise CalibrantError(
                    f"answers of up to {most} tokens do not fit the model's context of {self.max_length}"
                )
            self.truncated += len(tokens) > self.max_length - most
            lengths.append(len(tokens))
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: (-lengths[index], index))
        for begin in range(0, len(order), self.batch_size):
            part = order[begin : begin + self.batch_size]
            with quiet_lm_eval():
                found = super().generate_until([requests[index] for index in part], disable_tqdm=True)
            for index, answer in zip(part, found, strict=True):
                answers[index] = answer
            self.advance(len(part))
        return answers

    def _check_ids(self, tokens: list[int]) -> None:
        if max(tokens, default=0) >= self._vocabulary:
            raise CalibrantError(f"the tokenizer gives ids beyond the model's vocabulary of {self._vocabulary}")

    def _outputs(
        self, inputs: list[tuple[int, ...]], scored: list[int], groups: list[Sequences]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Each row with its logits ``[scored, vocabulary]``."""
        yield from self._rest(inputs, scored, [group.rows[0] for group in groups if len(group.rows) == 1], _Prefix())
        shared = [group for group in groups if len(group.rows) > 1]
        prefixes = [group.prefix for group in shared]
        for batch in batches(prefixes, self._most_tokens, [len(group.rows) - 1 for group in shared]):
            members = [shared[index] for index in batch]
            # What a longer prefix has beyond the shortest is computed with the rest of each row: nothing is padded.
            length = min(group.prefix for group in members)
            heads = torch.tensor([inputs[group.rows[0]][:length] for group in members])
            with self._picking(torch.zeros(heads.shape, dtype=torch.bool)):
                cache = self._forward(heads, use_cache=True).past_key_values
            owners = {row: number for number, group in enumerate(members) for row in group.rows}
            yield from self._rest(inputs, scored, list(owners), _Prefix(length, cache, owners))

    def _rest(
        self, inputs: list[tuple[int, ...]], scored: list[int], rows: list[int], prefix: "_Prefix"
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits of ``rows`` from their tokens after ``prefix``; padding comes last, where nothing attends to it."""
        for batch in batches([len(inputs[row]) - prefix.length for row in rows], self._most_tokens):
            part = [rows[index] for index in batch]
            length = len(inputs[part[0]]) - prefix.length
            tokens = torch.zeros(len(part), length, dtype=torch.long)
            wanted = torch.zeros(len(part), length, dtype=torch.bool)
            for number, row in enumerate(part):
                own = inputs[row][prefix.length :]
                tokens[number, : len(own)] = torch.tensor(own)
                wanted[number, len(own) - scored[row] : len(own)] = True
            with self._picking(wanted):
                logits = self._forward(tokens, **prefix.of(part)).logits
            picked = logits.flatten(0, 1) if self._picks else logits[wanted.to(logits.device)]
            yield from zip(part, picked.split([scored[row] for row in part]), strict=True)

    def _forward(self, tokens: torch.Tensor, **options: Any) -> Any:
        return self.model(input_ids=tokens.to(self.device), **options)

    @contextmanager
    def _picking(self, wanted: torch.Tensor) -> Iterator[None]:
        """Give the head only the positions ``wanted``, bool ``[rows, length]``; it returns ``[1, wanted, classes]``."""
        if not self._picks:
            yield
            return

        def pick(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            return inputs[0][wanted.to(inputs[0].device)][None]

        handle = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def _probe(self) -> tuple[bool, bool]:
        """Whether the head takes single positions, and whether a prefix's states can be copied for several rows."""
        self._picks = False
        count = min(self._vocabulary, len(self.tokenizer))
        draw = torch.Generator().manual_seed(0)
        stems = torch.randint(count, (2, _PROBE_PREFIX), generator=draw).tolist()
        ends = [torch.randint(count, (length,), generator=draw).tolist() for length in _PROBE_REST]
        inputs = [(*stems[number % 2], *end) for number, end in enumerate(ends)]
        scored = list(_PROBE_REST)
        apart = [Sequences((row,), 0) for row in range(len(inputs))]
        plain = dict(self._outputs(inputs, scored, apart))

        def same(groups: list[Sequences]) -> bool:
            try:
                found = dict(self._outputs(inputs, scored, groups))
            except Exception:  # any class, from any model that cannot do it
                return False
            return all(_close(found[row], plain[row]) for row in plain)

        self._picks = True
        picks = self._picks = same(apart)
        return picks, same([Sequences((0, 2), _PROBE_PREFIX), Sequences((1,), 0)])


@dataclass(frozen=True)
class _Prefix:
    """``length`` tokens that were computed before, and which row of ``cache`` has them for each input."""

    length: int = 0
    cache: Any = None
    owners: dict[int, int] = field(default_factory=dict)

    def of(self, rows: list[int]) -> dict[str, Any]:
        """Arguments of a forward pass that continues from a copy of the states of ``rows``."""
        if self.cache is None:
            return {"use_cache": False}
        copied = copy.copy(self.cache)
        copied.layers = [copy.copy(layer) for layer in self.cache.layers]
        copied.batch_select_indices(torch.tensor([self.owners[row] for row in rows]))
        return {"past_key_values": copied, "use_cache": True}


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().mean()) <= _TOLERANCE * float(
        expected.std()
    )


def _answer(logits: torch.Tensor, continuation: list[int]) -> Answer:
    """``logits`` are those of the longest continuation of this input; a shorter one ends at the same token."""
    own = logits[len(logits) - len(continuation) :]
    targets = torch.tensor(continuation, device=own.device)
    losses = negative_log_likelihoods(own, targets)
    if not bool(losses.isfinite().all()):
        raise CalibrantError("the model gives values that are not finite on a task; its weights may be damaged")
    return -float(losses.double().sum()), bool((own.argmax(-1) == targets).all())
