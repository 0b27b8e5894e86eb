"""Statistics of a model's activations over windows: what selections by activations look at."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers

from calibrant.calibration.windows import Window
from calibrant.modeling.feed_forward import first_tensor
from calibrant.modeling.hooks import hooked

# Enough to fill a forward pass, and little enough for its hidden states to fit beside a model.
_MOST_TOKENS = 1 << 13


class ActivationStatistics:
    """Runs windows through ``model`` and reduces what modules give.

    ``places`` are groups of modules, whose statistics are added up. ``reduce`` turns outputs ``[windows, tokens,
    width]`` (float32) into statistics ``[windows, any]``. Windows get ``prefix`` in front, which does not count.
    Windows of one length run together, so no token is padding.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        places: Sequence[Sequence[str]],
        prefix: list[int],
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._model, self._places, self._prefix, self._reduce = model, places, prefix, reduce

    @torch.inference_mode()
    def of(self, windows: Sequence[Window]) -> list[torch.Tensor]:
        """For every place, the statistics of all windows in their order, float32 ``[windows, any]``."""
        batches = list(self._batches(windows))
        order = torch.tensor([index for batch in batches for index in batch]).argsort()
        found = [self._of_batch([windows[index].tokens for index in batch]) for batch in batches]
        return [torch.cat(place)[order] for place in zip(*found, strict=True)]

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[int]]:
        """Indices of windows of one length, few enough for one forward pass."""
        by_length: dict[int, list[int]] = {}
        for index, window in enumerate(windows):
            by_length.setdefault(len(window.tokens), []).append(index)
        for length, indices in by_length.items():
            most = max(_MOST_TOKENS // (len(self._prefix) + length), 1)
            yield from (indices[begin : begin + most] for begin in range(0, len(indices), most))

    def _of_batch(self, rows: list[list[int]]) -> list[torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def noted(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                hidden = first_tensor(output)
                assert hidden is not None
                # Routers hand their experts tokens without rows.
                tokens = hidden.reshape(len(rows), -1, hidden.shape[-1])[:, len(self._prefix) :]
                found[name] = self._reduce(tokens.float()).cpu()

            return hook

        names = [name for place in self._places for name in place]
        with hooked(((self._model.get_submodule(name), noted(name)) for name in names), after=True):
            tokens = torch.tensor([self._prefix + row for row in rows], device=self._model.device)
            self._model.base_model(input_ids=tokens, use_cache=False)
        return [torch.stack([found[name] for name in place]).sum(0) for place in self._places]
