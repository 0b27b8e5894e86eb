"""Statistics of a layer's input that methods need, accumulated over counted tokens; ``tokens`` is their number.

Every ``add`` takes inputs ``[tokens, in]`` of any floating dtype. ``sums`` are what is added up over ranks.
"""

import torch

from calibrant.kernels import column_sums
from calibrant.kernels.gram import add_gram, add_product

_CHUNK_ROWS = 256
_MIRRORED_ROWS = 512


class Hessian:
    """``H = sum x x^T``, float32 and not divided by the token count (ours); ``matrix`` gives it in full."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._lower = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        self.tokens += inputs.shape[0]
        add_gram(self._lower, inputs)

    @property
    def sums(self) -> list[torch.Tensor]:
        """The tensors that inputs are added to."""
        return [self._lower]

    def matrix(self) -> torch.Tensor:
        """The full symmetric matrix, float32 ``[in, in]``; not a copy, so inputs that are added later change it."""
        for begin in range(0, len(self._lower), _MIRRORED_ROWS):
            end = begin + _MIRRORED_ROWS
            block = self._lower[begin:end, begin:end]
            block.copy_(block.tril() + block.tril(-1).T)
            self._lower[begin:end, end:] = self._lower[end:, begin:end].T
        return self._lower


class PairedHessian(Hessian):
    """A Hessian with ``drift = sum (y - x) x^T``, float32 ``[in, in]``; y is the input in the original model."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.drift = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    @property
    def sums(self) -> list[torch.Tensor]:
        return [*super().sums, self.drift]

    def add_pair(self, inputs: torch.Tensor, originals: torch.Tensor) -> None:
        """Add the same tokens' inputs in the compressed model and in the original model."""
        self.add(inputs)
        add_product(self.drift, originals - inputs, inputs)


class HessianDiagonal:
    """``sum x_j^2`` per input channel, ``values`` float32 ``[in]``: the diagonal of the Hessian (arXiv 2306.11695)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.values = torch.zeros(in_features, dtype=torch.float32, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        self.tokens += inputs.shape[0]
        if column_sums.takes(inputs):
            self.values += column_sums.column_squares(inputs)
            return
        # Squaring chunks that stay in the cache is much faster on a CPU than a norm over the first axis.
        for rows in inputs.split(_CHUNK_ROWS):
            self.values += rows.to(torch.float32, copy=True).square_().sum(0)

    @property
    def sums(self) -> list[torch.Tensor]:
        """The tensors that inputs are added to."""
        return [self.values]


class Magnitude:
    """Mean and largest ``|x_j|`` per input channel, float32 ``[in]``, for AWQ and SmoothQuant."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.largest = torch.zeros(in_features, dtype=torch.float32, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        self.tokens += inputs.shape[0]
        if column_sums.takes(inputs):
            total, largest = column_sums.column_magnitudes(inputs)
            self._sum += total
            torch.maximum(self.largest, largest, out=self.largest)
            return
        for rows in inputs.split(_CHUNK_ROWS):
            magnitude = rows.float().abs()
            self._sum += magnitude.sum(0)
            torch.maximum(self.largest, magnitude.amax(0), out=self.largest)

    @property
    def sums(self) -> list[torch.Tensor]:
        """The tensors that inputs are added to."""
        return [self._sum]

    @property
    def mean(self) -> torch.Tensor:
        """The mean of ``|x_j|`` over all tokens; zeros before the first."""
        return self._sum / max(self.tokens, 1)
