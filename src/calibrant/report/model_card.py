"""Model card of a compressed model."""

from typing import Any

from calibrant.formats.gguf_blocks import GgufBlocks
from calibrant.recipes.plan_notes import WRONG_EXPERTS

_WORST_LAYERS = 5


def model_card(record: dict[str, Any]) -> str:
    """Markdown for ``README.md`` from the record in ``calibrant.json``."""
    recipe, calibration = record["recipe"], record["calibration"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [calibrant, compressed]",
        "---",
        "",
        f"# {record['model']['name']}, {recipe['name']}",
        "",
        f"{recipe['description']}. Made by calibrant {record['calibrant_version']}, stored as {record['format']}.",
        "",
        *_loading(record),
        "",
        "## Calibration",
        "",
    ]
    if calibration is None:
        lines.append("The method uses no calibration data.")
    else:
        lines += [
            f"- {calibration['samples']} sequences of {calibration['length']} tokens, "
            f"strategy `{calibration['strategy']}`, seed {calibration['seed']}, draw {calibration['draw']}",
            f"- {calibration['counts']['masked_tokens']} tokens masked",
            f"- set SHA-256 `{calibration['set_sha256']}` (the set itself is in `calibration/`)",
        ]
    worst = sorted(record["layers"], key=lambda layer: -layer["relative_error"])[:_WORST_LAYERS]
    if worst:
        lines += ["", "## Layers with the largest relative error", "", "| layer | relative error |", "| --- | --- |"]
    lines += [f"| `{layer['name']}` | {layer['relative_error']:.3g} |" for layer in worst]
    if record["notes"]:
        lines += ["", "## Notes", ""] + [f"- {note}" for note in record["notes"]]
    lines += _proofs(record["proofs"])
    lines += ["", "Everything that determined this result is in `calibrant.json`.", ""]
    return "\n".join(lines)


def _loading(record: dict[str, Any]) -> list[str]:
    """How the model is loaded, by what loads it."""
    scheme = record["recipe"]["scheme"]
    weights, kind = scheme["weights"] or {}, record["format"]
    if kind == GgufBlocks.name:
        return ["Run `model.gguf` with llama.cpp; other loaders do not read this folder.", "", "```sh",
                "llama-cli -m path/to/this/folder/model.gguf", "```"]  # fmt: skip
    if any(WRONG_EXPERTS in note for note in record["notes"]):
        return ["Do not load this folder with transformers, which gives wrong values (see the notes)."]
    imported, options = "AutoModelForCausalLM", ""
    if kind in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        options = ", dtype=torch.bfloat16"
    elif kind == "pack-quantized" and not weights.get("symmetric", True) and scheme["activations"] is None:
        imported += ", CompressedTensorsConfig"
        options = ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    lines = ["```python", *(["import torch"] if "torch." in options else []), f"from transformers import {imported}"]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{options})', "```"]
    if kind in ("gptq", "awq"):
        lines += ["", f"transformers needs a package for {kind} checkpoints (gptqmodel)."]
    return lines


def _proofs(proofs: list[dict[str, Any]]) -> list[str]:
    if not proofs:
        return []
    lines = ["", "## Engines", "", "Loaded and compared with the stored values (nats, `calibrant prove`):", ""]
    lines += ["| engine | agrees | difference | allowed | same greedy tokens |", "| --- | --- | --- | --- | --- |"]
    return lines + [
        f"| {one['engine']} {one['version']} ({one['dtype']}) | {'yes' if one['agrees'] else '**no**'} | "
        f"{one['difference']:.2g} | {one['allowed']:.2g} | {one['same_tokens']} of {one['new_tokens']} |"
        for one in proofs
    ]
