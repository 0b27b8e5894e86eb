"""The logits that a student learns from, and how both models compute theirs."""

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
import transformers

from calibrant.errors import CalibrantError
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.model_head import Inputs, ModelHead, agree, lazy_head, logits_and_states, module_before_head
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.stopping import check_stop


class Teacher(Protocol):
    """Gives the original model's logits."""

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """Logits ``[rows, length, vocabulary]`` (classifiers: ``[rows, classes]``) of a model's ``inputs``."""


class WholeTeacher:
    """Runs ``model`` each time, with matrix products in ``dtype``."""

    def __init__(self, model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        keep_head_in_float32(model)

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """See ``Teacher``."""
        return model_logits(self._model, inputs, self._dtype)


class RememberingTeacher:
    """Makes the logits of known rows of their last hidden states, which ``remembered`` computes once."""

    def __init__(self, head: ModelHead, states: dict[bytes, torch.Tensor]) -> None:
        self._head, self._states = head, states

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """See ``Teacher``."""
        states = torch.stack([self._states[_key(row)] for row in inputs["input_ids"]])
        return self._head.logits(states, inputs)


@torch.no_grad()
def remembered(
    model: transformers.PreTrainedModel,
    folder: ModelFolder,
    rows: Sequence[TokenRows],
    dtype: torch.dtype,
    progress: Progress,
) -> Teacher:
    """A teacher of ``model``, the one in ``folder``, for ``rows``: without its blocks, if its head needs no more.

    Where the head needs more than last hidden states, or is that of a classifier, the model runs each time.

    Raises:
        StoppedError: a signal asked to stop.
    """
    whole = WholeTeacher(model, dtype)
    before = module_before_head(model, _inputs(rows[0].ids[:1]))
    if before is None or not folder.causal:
        return whole
    head = lazy_head(folder, before, model.device)
    states: dict[bytes, torch.Tensor] = {}
    with progress.task("original", sum(len(part.ids) for part in rows), "rows") as task:
        for ids in (row[None] for part in rows for row in part.ids):
            with computing(model.device, dtype):
                logits, found = logits_and_states(model, before, _inputs(ids))
            found = found.float()
            if not states and not _makes(head, found, _inputs(ids), logits):
                return whole
            states[_key(ids[0])] = found[0]
            task.advance()
            check_stop("the last block")
    return RememberingTeacher(head, states)


def _makes(head: ModelHead, states: torch.Tensor, inputs: Inputs, logits: torch.Tensor) -> bool:
    """Whether ``head`` makes ``logits`` of ``states``."""
    try:
        return agree(head.logits(states, inputs), logits)
    except RuntimeError:  # the model reads parameters outside its head, which are not loaded
        return False


def model_logits(model: transformers.PreTrainedModel, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """The logits of ``model``, whose matrix products are computed in ``dtype``.

    Raises:
        CalibrantError: it gives none.
    """
    with computing(model.device, dtype):
        found = model(**inputs)
    if "logits" not in found:
        raise CalibrantError(f"{type(model).__name__}: gives no logits, which training needs; take a model with a head")
    logits: torch.Tensor = found.logits
    return logits


def computing(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast context that computes matrix products in ``dtype``."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_head_in_float32(model: transformers.PreTrainedModel) -> None:
    """Compute the head in float32: rounding logits to bfloat16 costs more than quantizing the student to 8 bits."""
    head = model.get_output_embeddings()
    if head is None:
        return
    own = weakref.ref(head)  # the head keeps this function: a reference back would keep its weights in memory

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        module = own()
        assert module is not None
        with torch.autocast(hidden.device.type, enabled=False):
            logits: torch.Tensor = type(module).forward(module, hidden.float())
        return logits

    head.forward = forward


def _inputs(ids: torch.Tensor) -> Inputs:
    return {"input_ids": ids}


def _key(row: torch.Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
