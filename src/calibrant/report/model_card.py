"""Model card of a compressed model."""

from typing import Any

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
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
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
