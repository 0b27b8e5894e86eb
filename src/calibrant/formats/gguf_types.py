"""llama.cpp's types of quantized weights: what their blocks hold (ggml, ``ggml-common.h``)."""

from dataclasses import dataclass

SUPER_BLOCK = 256


@dataclass(frozen=True)
class GgufType:
    """A type.

    Attributes:
        bits: bits of a weight's code.
        group_size: weights that share a scale (and a minimum).
        minima: whether groups have a minimum, ``w = scale q - minimum``, q from 0; else q is signed.
        sub_scale: in super-blocks of 256, the largest integer that multiplies the super-block's scale to give a
            group's; None where groups have float16 scales of their own.
        fallback: the type of layers that super-blocks do not divide, as in llama.cpp's quantizer.
    """

    bits: int
    group_size: int
    minima: bool = False
    sub_scale: int | None = None
    fallback: str | None = None

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.group_size if self.sub_scale is None else SUPER_BLOCK

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
    "q4_0": GgufType(4, 32),
    "q4_1": GgufType(4, 32, minima=True),
    "q5_0": GgufType(5, 32),
    "q5_1": GgufType(5, 32, minima=True),
    "q8_0": GgufType(8, 32),
    "q2_k": GgufType(2, 16, minima=True, sub_scale=15, fallback="q4_0"),
    "q3_k": GgufType(3, 16, sub_scale=31, fallback="q4_0"),
    "q4_k": GgufType(4, 32, minima=True, sub_scale=63, fallback="q5_0"),
    "q5_k": GgufType(5, 32, minima=True, sub_scale=63, fallback="q5_1"),
    "q6_k": GgufType(6, 16, sub_scale=127, fallback="q8_0"),
}
