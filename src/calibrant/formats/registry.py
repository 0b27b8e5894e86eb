"""The quantized checkpoint format of each layout."""

from calibrant.formats.awq import Awq
from calibrant.formats.compressed_tensors import IntQuantized, PackQuantized
from calibrant.formats.gptq import Gptq
from calibrant.formats.quantized import FormatName, Layout, WeightFormat

FORMATS: tuple[FormatName, ...] = ("compressed-tensors", "gptq", "awq")


def format_for(layout: Layout) -> WeightFormat:
    """The format that stores ``layout``; int8 activations need int8 weight tensors."""
    if layout.format == "gptq":
        return Gptq()
    if layout.format == "awq":
        return Awq()
    return IntQuantized() if layout.activations else PackQuantized()
