"""The grid of each of llama.cpp's types."""

import torch

from calibrant.formats.gguf_types import GGUF_TYPES, SUPER_BLOCK
from calibrant.quantization.block_scales import BlockScales
from calibrant.quantization.grids import GridSpec, RangeSearch


def gguf_spec(kind: str, range_search: RangeSearch) -> GridSpec:
    """The grid of the type ``kind``; with ``range_search`` "importance" scales are fitted with the inputs' squares."""
    known = GGUF_TYPES[kind]
    blocks = BlockScales(known.minima)
    if known.sub_scale is not None:
        blocks = BlockScales(known.minima, SUPER_BLOCK // known.group_size, known.sub_scale, not known.minima)
    symmetric = not known.minima
    return GridSpec(known.bits, symmetric, known.group_size, torch.float16, range_search, blocks=blocks)
