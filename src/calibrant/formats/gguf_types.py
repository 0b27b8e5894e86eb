"""llama.cpp's types of quantized weights: what their blocks hold (ggml, ``ggml-common.h``)."""

from dataclasses import dataclass
from typing import Literal

GgufName = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
SUPER_BLOCK = 256


@dataclass(frozen=True)
class GgufType:
    """A type.

    Attributes:
        name: its name, in small letters.
        bits: bits of a weight's code.
        group_size: weights that share a scale (and a minimum).
        minima: whether groups have a minimum, ``w = scale q - minimum``, q from 0; else q is signed.
        sub_scale: in super-blocks of 256, the largest integer that multiplies the super-block's scale to give a
            group's; None where groups have float16 scales of their own.
        fallback: the type of layers that super-blocks do not divide, as in llama.cpp's quantizer.
    """

    name: GgufName
    bits: int
    group_size: int
    minima: bool = False
    sub_scale: int | None = None
    fallback: GgufName | None = None

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.group_size if self.sub_scale is None else SUPER_BLOCK

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each weight, scales included."""
        return 8 * self.block_bytes / self.block

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        codes = self.block * self.bits // 8
        float16 = 2 + 2 * self.minima
        if self.sub_scale is None:
            return codes + float16
        groups = SUPER_BLOCK // self.group_size
        # Sixteen scales of eight bits, or of four with minima of four; else six bits each.
        return codes + float16 + (groups if self.bits in (2, 6) else 12)


GGUF_TYPES: dict[str, GgufType] = {
    one.name: one
    for one in (
        GgufType("q4_0", 4, 32),
        GgufType("q4_1", 4, 32, minima=True),
        GgufType("q5_0", 5, 32),
        GgufType("q5_1", 5, 32, minima=True),
        GgufType("q8_0", 8, 32),
        GgufType("q2_k", 2, 16, minima=True, sub_scale=15, fallback="q4_0"),
        GgufType("q3_k", 3, 16, sub_scale=31, fallback="q4_0"),
        GgufType("q4_k", 4, 32, minima=True, sub_scale=63, fallback="q5_0"),
        GgufType("q5_k", 5, 32, minima=True, sub_scale=63, fallback="q5_1"),
        GgufType("q6_k", 6, 16, sub_scale=127, fallback="q8_0"),
    )
}


def fitting_type(kind: GgufName, columns: int) -> GgufName:
    """The type that a layer of ``columns`` inputs gets where ``kind`` is asked for: ``kind``, or its fallback."""
    fallback = GGUF_TYPES[kind].fallback
    return kind if fallback is None or columns % SUPER_BLOCK == 0 else fallback
