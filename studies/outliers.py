"""Outlier channels planted behind norms: some made larger by a known factor, the linears' columns smaller by the same.

The function is as before; with a factor that is a power of two, bit for bit. Norms must be of the kind whose gain is
their weight (Llama's, GPT-2's), and the model stored in one file.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# By norm: the linears that read it, and whether they are stored [in, out].
_BEHIND = {
    "input_layernorm": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), False),
    "post_attention_layernorm": (("mlp.gate_proj", "mlp.up_proj"), False),
    "ln_1": (("attn.c_attn",), True),
    "ln_2": (("mlp.c_fc",), True),
}


def plant(model: Path, folder: Path, channels: int, factor: float) -> dict[str, list[int]]:
    """A copy of ``model`` with outliers; returns the channels behind each norm's weight."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    planted = {}
    for name in sorted(tensors):
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm not in _BEHIND:
            continue
        chosen = torch.randperm(len(tensors[name]), generator=generator)[:channels]
        linears, transposed = _BEHIND[norm]
        for gain in (name, name.removesuffix("weight") + "bias"):
            if gain in tensors:
                tensors[gain][chosen] *= factor
        for linear in linears:
            weight = tensors[f"{block}.{linear}.weight"]
            (weight if transposed else weight.T)[chosen] /= factor
        planted[name] = sorted(chosen.tolist())
    if any("feedforward_layernorm" in name for name in tensors):
        raise SystemExit(f"{model}: its norms are not of the kind that outliers can be planted behind")
    if not planted:
        raise SystemExit(f"{model}: has no norm of the names {', '.join(_BEHIND)}")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return planted


def found_share(planted: dict[str, list[int]], before: Path, after: Path) -> float:
    """The share of planted channels among as many whose scale fell most."""
    first, second = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    hits = 0
    for name, channels in planted.items():
        alpha = second[name].float() / first[name].float()
        hits += len(set(alpha.argsort()[: len(channels)].tolist()) & set(channels))
    return hits / sum(map(len, planted.values()))
