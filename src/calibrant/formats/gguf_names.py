"""Names of a model's layers in the GGUF file that llama.cpp's converter (``convert_hf_to_gguf.py``) makes of it.

The ``gguf`` package knows the tensors of each of llama.cpp's architectures and the checkpoint names that become them.
What it does not know is here: which architecture the converter takes for a model type, and which tensors it splits or
reorders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibrant.errors import CalibrantError

_ARCHITECTURES = {
    "bamba": "granitehybrid",
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "exaone4_5": "exaone4",
    "falcon_mamba": "mamba",
    "glm": "chatglm",
    "glm4_moe_lite": "deepseek2",
    "glm4v": "glm4",
    "glm4v_moe": "glm4moe",
    "glm_moe_dsa": "glm-dsa",
    "glm_ocr": "glm4",
    "gpt-sw3": "gpt2",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "mimo_v2_flash": "mimo2",
    "ministral": "llama",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe",  # its tensors include those of nemotron_h
    "olmo3": "olmo2",
    "paddleocr_vl": "paddleocr",
    "phi": "phi2",
    "qwen2_5_omni": "qwen2vl",
    "qwen2_5_vl": "qwen2vl",
    "solar_open": "glm4moe",
    "step3p5": "step35",
    "youtu": "deepseek2",
}
"""llama.cpp's architecture by model type, where it is not the same name in another spelling."""

_PARTS = {
    ".experts.gate_up_proj": ("FFN_GATE_EXP", "FFN_UP_EXP"),
    ".experts.up_proj": ("FFN_UP_EXP",),
    ".experts.down_proj": ("FFN_DOWN_EXP",),
    ".shared_mlp.input_linear": ("FFN_GATE_SHEXP", "FFN_UP_SHEXP"),
    ".linear_attn.in_proj_qkvz": ("ATTN_QKV", "ATTN_GATE"),
    ".self_attn.kv_b_proj": ("ATTN_V_B", "ATTN_K_B"),
}
"""Tensors that the converter makes of a layer, by the end of its name; for architectures that have all of them."""

_DENSE_PARTS = {".shared_mlp.input_linear": ("FFN_GATE", "FFN_UP"), ".shared_mlp.output_linear": ("FFN_DOWN",)}
"""The same for Granite models without experts, whose shared MLP is the only one."""

_UNMEASURED = "ATTN_K_B"
"""The keys' half of ``kv_b_proj`` is stored transposed: llama.cpp multiplies it with queries."""

_KEEPS_GATES_AND_UPS_FUSED = ("mistral4",)
"""Architectures that have separate gates and ups of experts too, but whose converter does not split them."""

_FEW = 20
"""Number of left out tensors that a note names."""

_WRAPPERS = ("language_model.", "text_model.")


@dataclass(frozen=True)
class GgufTensor:
    """One GGUF tensor that is made of a layer's weights.

    Attributes:
        name: its name, with the suffix.
        matrices: the number of matrices in it that read the layer's input.
        columns: the layer's input features in the order of the tensor's columns, ``[in]`` int64; None for theirs.
    """

    name: str
    matrices: int = 1
    columns: np.ndarray | None = None

    def rows(self, sums: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The layer's sums ``[experts, in]`` and token counts ``[experts, 1]`` as this tensor's, one row a matrix."""
        if self.columns is not None:
            sums = sums[:, self.columns]
        return np.repeat(sums, self.matrices, axis=0), np.repeat(tokens, self.matrices, axis=0)


@dataclass(frozen=True)
class GgufNames:
    """Names of the layers of a model in its GGUF file.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        guessed: whether the model type is not known here, and the architecture taken is Llama's.
        tensors: the tensors that each layer becomes, by the layer's name.
        left_out: layers without a name, and tensors whose inputs are not those of a layer.
    """

    architecture: str
    guessed: bool
    tensors: dict[str, list[GgufTensor]]
    left_out: tuple[str, ...]

    def notes(self) -> list[str]:
        """A sentence for each thing that a user should know about the names."""
        sentences = []
        if self.guessed:
            sentences.append("which architecture of llama.cpp this model becomes is not known: the names are Llama's")
        if self.left_out:
            few = ", ".join(self.left_out[:_FEW]) + (", ..." if len(self.left_out) > _FEW else "")
            sentences.append(
                f"left out, {len(self.left_out)} tensors without measured inputs or a name in llama.cpp: {few}"
            )
        return sentences


def gguf_names(config: Any, blocks: int, layers: Mapping[str, str]) -> GgufNames:
    """llama.cpp's names for the weights of linear layers and fused experts.

    Args:
        config: transformers' configuration of the text model.
        blocks: number of blocks of the model.
        layers: the name in the checkpoint of each layer's weight, by the layer's name; the layer's name itself if the
            weight is not one tensor there.

    Raises:
        CalibrantError: no layer has a name, or the extra ``gguf`` is not installed.
    """
    gguf = gguf_library()
    model_type = config.model_type.removesuffix("_text")
    known = {_spelling(name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = known.get(_spelling(_ARCHITECTURES.get(model_type, model_type)))
    naming = _Naming(config, blocks, arch if arch is not None else gguf.MODEL_ARCH.LLAMA)
    found = {layer: naming.tensors(layer, stored) for layer, stored in layers.items()}
    named = {layer: tensors for layer, tensors in found.items() if tensors}
    if not named:
        reason = (
            f"no layer of this {config.model_type} model is among the tensors that gguf {_version()} lists for "
            f"llama.cpp's architecture {naming.name}"
            if arch is not None
            else f"which architecture of llama.cpp {config.model_type} models become is not known, and their layers do "
            "not have the names of Llama's"
        )
        raise CalibrantError(f"{next(iter(layers), 'no layer')}: {reason}; an importance matrix would be empty")
    nameless = [layer for layer in layers if layer not in named]
    return GgufNames(naming.name, arch is None, named, (*nameless, *naming.unmeasured))


def gguf_library() -> Any:
    """The package ``gguf``.

    Raises:
        CalibrantError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CalibrantError("GGUF files need the extra: pip install 'calibrant[gguf]'") from error
    return gguf


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _spelling(name: str) -> str:
    return name.replace("_", "").replace("-", "")


class _Naming:
    """llama.cpp's names for one model; ``unmeasured`` collects tensors whose inputs are not those of a layer."""

    def __init__(self, config: Any, blocks: int, arch: Any) -> None:
        gguf = gguf_library()
        self.name: str = gguf.MODEL_ARCH_NAMES[arch]
        self.unmeasured: list[str] = []
        self._config = config
        self._map = gguf.get_tensor_name_map(arch, blocks)
        self._patterns = {
            one.name: pattern for one, pattern in gguf.TENSOR_NAMES.items() if one in gguf.MODEL_TENSORS[arch]
        }

    def tensors(self, layer: str, stored: str) -> list[GgufTensor]:
        """The tensors that ``layer`` becomes; none if it has no name."""
        parts = self._parts(layer)
        if parts:
            block = next(part for part in layer.split(".") if part.isdecimal())
            names = {part: self._patterns[part].format(bid=block) + ".weight" for part in parts}
            self.unmeasured += [name for part, name in names.items() if part == _UNMEASURED]
            tensors = [GgufTensor(name) for part, name in names.items() if part != _UNMEASURED]
        else:
            tensors = [GgufTensor(name) for name in self._mapped(stored, layer)]
        if parts[:1] == ("ATTN_V_B",):
            return [replace(one, matrices=self._config.num_attention_heads) for one in tensors]
        if layer.endswith(".linear_attn.out_proj"):
            return [replace(one, columns=self._value_heads()) for one in tensors]
        return tensors

    def _parts(self, layer: str) -> tuple[str, ...]:
        """Names of the tensors that the converter makes of this layer by rules of its own; none for other layers."""
        tables = [_PARTS]
        if not getattr(self._config, "num_local_experts", 0):
            tables.insert(0, _DENSE_PARTS)
        for table in tables:
            for end, parts in table.items():
                fused = end == ".experts.gate_up_proj" and self.name in _KEEPS_GATES_AND_UPS_FUSED
                if layer.endswith(end) and not fused and all(part in self._patterns for part in parts):
                    return parts
        return ()

    def _mapped(self, *names: str) -> list[str]:
        """The name that the package's map gives to the first of ``names`` that it knows."""
        for name in names:
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found = self._map.get_name(name.removesuffix(".weight"))
            if found is not None:
                return [f"{found}.weight"]
        return []

    def _value_heads(self) -> np.ndarray | None:
        """Columns of a linear attention's output projection: Qwen 3.5's converter goes round the key heads.

        Checkpoints have the value heads of the first key head first, GGUF files the first value head of each key head.
        """
        if self.name not in ("qwen35", "qwen35moe"):
            return None
        keys, values = self._config.linear_num_key_heads, self._config.linear_num_value_heads
        columns = np.arange(values * self._config.linear_value_head_dim)
        return columns.reshape(keys, values // keys, -1).swapaxes(0, 1).ravel()
