"""The symmetric product ``H += X^T X``, where second-order methods spend most of their time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from calibrant.kernels import bfloat16_gram, bfloat16_tile, float32_products, float32_tile

# Column blocks of the lower triangle: enough to skip most of the upper half, few enough for products at full rate.
_BLOCKS = 6
_SMALLEST_BLOCK = 64


def add_gram(lower: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add ``inputs^T inputs`` to the lower triangle of ``lower`` (float32 ``[in, in]``), in place.

    ``inputs`` ``[tokens, in]`` of any floating dtype. Products and sums are float32. Entries above the diagonal are
    unspecified afterwards.
    """
    if inputs.dtype is torch.bfloat16 and inputs.device.type == "cpu" and bfloat16_tile.available():
        bfloat16_gram.add_gram_bfloat16(lower, inputs)
        return
    if inputs.dtype is torch.float32 and inputs.device.type == "cpu" and float32_tile.available():
        float32_products.add_lower_gram(lower, inputs)
        return
    width = lower.shape[0]
    values = inputs.float()
    block = max(_SMALLEST_BLOCK, -(-width // _BLOCKS))
    with _exact_bfloat16_products(inputs.dtype):
        for begin in range(0, width, block):
            end = min(begin + block, width)
            lower[begin:end, :end].addmm_(values[:, begin:end].T, values[:, :end])


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left^T right`` to ``total`` (float32 ``[in, in]``), in place; sums are float32.

    ``left`` and ``right`` ``[tokens, in]`` have the same floating dtype.
    """
    with _exact_bfloat16_products(left.dtype):
        total.addmm_(left.float().T, right.float())


@contextmanager
def _exact_bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Let the CPU multiply float32 tensors of bfloat16 numbers in its bfloat16 units, summing in float32.

    The products are exact either way; bfloat16 units are only faster. The setting is restored on exit.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # missing from torch's type hints
    before = settings.fp32_precision
    if dtype is torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
