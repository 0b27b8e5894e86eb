"""The original model's next-token logits on fixed windows: from the model, or from hidden states kept once.

Logits of a whole vocabulary are a hundred times larger than what is left of the model after its last block: the final
hidden state, of which the head makes the logits again. So a study runs an original once, and a comparison needs its
head alone.
"""

from pathlib import Path
from typing import Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open

from calibrant.errors import CalibrantError, first_line
from calibrant.formats.safetensors_file import save_tensors
from calibrant.hashing import sha256_bytes
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.model_head import ModelHead, agree, lazy_head, logits_and_states, module_before_head
from calibrant.progress import Progress

_FILE, _BEFORE = "states.safetensors", "calibrant.before_head"
_NOT_ALONE = "its logits do not follow from its last hidden states alone"


class Original(Protocol):
    """Gives the logits that compressed models are compared with."""

    def logits(self, index: int, window: torch.Tensor) -> torch.Tensor:
        """Logits ``[length - 1, vocabulary]`` that predict the tokens of ``window``, number ``index``, from the second
        on."""


class WholeOriginal:
    """Runs the model on every window."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model

    def logits(self, index: int, window: torch.Tensor) -> torch.Tensor:
        """See ``Original``."""
        return window_logits(self._model, window)


class RememberingOriginal:
    """Runs the model's blocks on every window once, for several comparisons; its head makes the logits each time.

    Last hidden states are kept in files in ``scratch``, an empty folder. Where the head needs more than them or rounds
    coarsely (in bfloat16), or the folder is full, the model runs on every window every time.
    """

    def __init__(self, model: transformers.PreTrainedModel, scratch: Path) -> None:
        self._model, self._scratch = model, scratch
        self._head: ModelHead | None = None
        self._begun = False

    def logits(self, index: int, window: torch.Tensor) -> torch.Tensor:
        """See ``Original``."""
        if not self._begun:
            self._begun = True
            self._begin(window)
        if self._head is None:
            return window_logits(self._model, window)
        file = self._file(window)
        if file.exists():
            with safe_open(file, framework="pt") as opened:
                return _head_logits(self._head, opened.get_tensor("state"), window)
        logits, state = _logits_and_state(self._model, self._head.before, window)
        return _head_logits(self._head, state, window) if self._keep(window, state) else logits

    def _begin(self, window: torch.Tensor) -> None:
        """Find the head, if it makes the model's logits of the last hidden states, and keep those of ``window``."""
        before = module_before_head(self._model, {"input_ids": window[None]})
        if before is None:
            return
        logits, state = _logits_and_state(self._model, before, window)
        head = ModelHead(self._model, before)
        if agree(_head_logits(head, state, window), logits) and self._keep(window, state):
            self._head = head

    def _keep(self, window: torch.Tensor, state: torch.Tensor) -> bool:
        """Write the states of ``window``; if that fails, remember nothing from now on."""
        try:
            save_tensors({"state": state}, self._file(window))
        except (OSError, SafetensorError):
            self._file(window).unlink(missing_ok=True)
            self._head = None
            return False
        return True

    def _file(self, window: torch.Tensor) -> Path:
        return self._scratch / f"{sha256_bytes(window.numpy().tobytes())}.safetensors"


class StoredOriginal:
    """Makes logits of stored hidden states by the model's head; the blocks are not loaded.

    Args:
        folder: the original model.
        states: a folder that ``store_states`` filled.
        device: where the head runs.

    Raises:
        CalibrantError: the model cannot be read.
    """

    def __init__(self, folder: ModelFolder, states: Path, device: torch.device) -> None:
        self._file = states / _FILE
        try:
            with safe_open(self._file, framework="pt") as file:
                before = file.metadata()[_BEFORE]
        except Exception as error:  # damaged files make the library raise many unrelated classes
            raise _damaged(self._file, error) from error
        self._head = lazy_head(folder, before, device)

    def logits(self, index: int, window: torch.Tensor) -> torch.Tensor:
        """See ``Original``."""
        with safe_open(self._file, framework="pt") as file:
            state = file.get_slice("states")[index]
        return _head_logits(self._head, state, window)


def window_logits(model: transformers.PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Logits ``[length - 1, vocabulary]`` that predict the tokens of ``window`` from the second on."""
    logits: torch.Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
    return logits


@torch.inference_mode()
def store_states(
    model: transformers.PreTrainedModel, folder: ModelFolder, windows: torch.Tensor, target: Path, progress: Progress
) -> None:
    """Run ``model`` over ``windows`` (int64 ``[n, length]``) and store them and its final hidden states in ``target``.

    Raises:
        CalibrantError: the head makes other logits of the stored states than the model does.
    """
    before = module_before_head(model, {"input_ids": windows[:1]})
    if before is None:
        raise CalibrantError(f"{folder.path}: {_NOT_ALONE}")
    states: list[torch.Tensor] = []
    with progress.task("original", len(windows), "windows") as task:
        for window in windows:
            logits, state = _logits_and_state(model, before, window)
            if not states:
                _check(_head_logits(lazy_head(folder, before, model.device), state, window), logits, folder)
            states.append(state)
            task.advance()
    save_tensors({"states": torch.stack(states), "windows": windows}, target / _FILE, {_BEFORE: before})


def _logits_and_state(
    model: transformers.PreTrainedModel, before: str, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``window_logits``, and what the module ``before`` gave, ``[length - 1, width]`` on the CPU."""
    logits, states = logits_and_states(model, before, {"input_ids": window[None]})
    return logits[0, :-1], states[0, :-1].cpu()


def _head_logits(head: ModelHead, state: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Logits ``[length - 1, vocabulary]`` of hidden states ``[length - 1, width]`` of ``window``."""
    return head.logits(state[None], {"input_ids": window[None, :-1]})[0]


def stored_windows(states: Path) -> torch.Tensor:
    """The windows in a folder that ``store_states`` filled, int64 ``[n, length]``."""
    try:
        with safe_open(states / _FILE, framework="pt") as file:
            windows: torch.Tensor = file.get_tensor("windows")
    except Exception as error:  # damaged files make the library raise many unrelated classes
        raise _damaged(states / _FILE, error) from error
    return windows


def _damaged(file: Path, error: Exception) -> CalibrantError:
    return CalibrantError(f"{file}: damaged ({first_line(error)}); delete its folder, it is made again")


def _check(again: torch.Tensor, logits: torch.Tensor, folder: ModelFolder) -> None:
    if not bool(logits.isfinite().all()):
        raise CalibrantError(f"{folder.path}: gives values that are not finite; its weights may be damaged")
    if not agree(again, logits):
        raise CalibrantError(f"{folder.path}: {_NOT_ALONE}")
