"""The symmetric product ``S += X^T X`` that second-order methods spend most of their time on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from calibrant.kernels import bfloat16_gram, bfloat16_tile

# Column blocks of the lower triangle: narrow enough to skip most of the upper half, wide enough for full-rate products.
_BLOCKS = 6
_SMALLEST_BLOCK = 64


def add_gram(lower: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add ``inputs^T inputs`` to the lower triangle of ``lower`` (float32 ``[in, in]``), in place.

    ``inputs`` ``[tokens, in]`` of any floating dtype. Products and sums are float32; entries above the diagonal
    blocks are left alone, those inside them hold unspecified values.
    """
    if inputs.dtype is torch.bfloat16 and inputs.device.type == "cpu" and bfloat16_tile.available():
        bfloat16_gram.add_gram_bfloat16(lower, inputs)
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

    ``left`` and ``right`` ``[tokens, in]`` of one floating dtype; of bfloat16 inputs the products are bfloat16's.
    """
    with _exact_bfloat16_products(left.dtype):
        total.addmm_(left.float().T, right.float())


@contextmanager
def _exact_bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Let the CPU multiply float32 values that are bfloat16 numbers as bfloat16, summing in float32.

    The products are exact either way; the processor's bfloat16 units are only faster. The setting is restored.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a class torch's own stubs leave out
    before = settings.fp32_precision
    if dtype is torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
