"""The quantized checkpoint format of each layout."""

from calibrant.formats.awq import Awq
from calibrant.formats.compressed_tensors import IntQuantized, PackQuantized
from calibrant.formats.float_quantized import FloatQuantized, MxFp4Packed, NvFp4Packed
from calibrant.formats.gguf_blocks import GgufBlocks
from calibrant.formats.gpt_oss import GptOssExperts
from calibrant.formats.gptq import Gptq
from calibrant.formats.quantized import FormatName, Layout, WeightFormat

FORMATS: tuple[FormatName, ...] = ("compressed-tensors", "gptq", "awq", "gguf")
_FLOATS: dict[str, WeightFormat] = {"fp8": FloatQuantized(), "mxfp4": MxFp4Packed(), "nvfp4": NvFp4Packed()}


def format_for(layout: Layout) -> WeightFormat:
    """The format that stores ``layout``; int8 activations need int8 weight tensors."""
    if layout.format == "gguf":
        return GgufBlocks()
    if layout.format == "gpt-oss":
        return GptOssExperts()
    if layout.type != "int":
        return _FLOATS[layout.type]
    if layout.format == "gptq":
        return Gptq()
    if layout.format == "awq":
        return Awq()
    return IntQuantized() if layout.activations and layout.input_type == "int8" else PackQuantized()
