"""Mean activations of a model over windows: what selections by activations look at."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers

from calibrant.calibration.windows import Window
from calibrant.modeling.feed_forward import find_feed_forward, first_tensor
from calibrant.modeling.hooks import hooked

# Enough to fill a forward pass, and little enough for its hidden states to fit beside a model.
_MOST_TOKENS = 1 << 13


class FeedForwardMeans:
    """Runs windows through ``model`` and takes the means of what its feed-forward parts give.

    A window's vector is the mean of the output of every block's feed-forward part over its tokens, scaled to length 1
    per block and joined over ``blocks``. Windows get ``prefix`` in front, which does not count. Windows of one length
    run together, so no token is padding.

    Raises:
        CalibrantError: the model has no feed-forward parts.
    """

    def __init__(self, model: transformers.PreTrainedModel, prefix: list[int]) -> None:
        self._model, self._places, self._prefix = model, find_feed_forward(model), prefix

    @property
    def blocks(self) -> int:
        """Number of blocks with a feed-forward part."""
        return len(self._places)

    @cached_property
    def width(self) -> int:
        """Numbers of a vector."""
        with torch.inference_mode():
            return self._of_batch([[0]]).shape[1]

    @torch.inference_mode()
    def of(self, windows: Sequence[Window]) -> np.ndarray:
        """The vectors of all windows in their order, float32 ``[windows, width]``."""
        batches = list(self._batches(windows))
        order = torch.tensor([index for batch in batches for index in batch]).argsort()
        found = torch.cat([self._of_batch([windows[index].tokens for index in batch]) for batch in batches])
        vectors: np.ndarray = found[order].numpy()
        return vectors

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[int]]:
        """Indices of windows of one length, few enough for one forward pass."""
        by_length: dict[int, list[int]] = {}
        for index, window in enumerate(windows):
            by_length.setdefault(len(window.tokens), []).append(index)
        for length, indices in by_length.items():
            most = max(_MOST_TOKENS // (len(self._prefix) + length), 1)
            yield from (indices[begin : begin + most] for begin in range(0, len(indices), most))

    def _of_batch(self, rows: list[list[int]]) -> torch.Tensor:
        found: dict[str, torch.Tensor] = {}

        def noted(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                hidden = first_tensor(output)
                assert hidden is not None
                # Routers hand their experts tokens without rows.
                tokens = hidden.reshape(len(rows), -1, hidden.shape[-1])[:, len(self._prefix) :]
                found[name] = tokens.float().mean(1).cpu()

            return hook

        names = [name for place in self._places for name in place]
        with hooked(((self._model.get_submodule(name), noted(name)) for name in names), after=True):
            tokens = torch.tensor([self._prefix + row for row in rows], device=self._model.device)
            self._model.base_model(input_ids=tokens, use_cache=False)
        blocks = [torch.stack([found[name] for name in place]).sum(0) for place in self._places]
        return torch.cat([means / means.norm(dim=1, keepdim=True).clamp(min=1e-12) for means in blocks], 1)
