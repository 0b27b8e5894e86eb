"""Model folders damaged in one way each, and what a refusal looks like."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def header_only(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x10")


def edited_header(**changes: object):
    """One tensor's entry in the header changed; sizes stay right."""

    def edit(model: Path) -> None:
        file = model / "model.safetensors"
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header["model.norm.weight"].update(changes)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return edit


def without(name: str):
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        del tensors[name]
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return edit


def missing_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def escaping_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def edited_config(**changes: object):
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def refused(status: int, out: str, err: str, said: str, place: Path) -> None:
    assert status == 2
    assert said in err
    assert err.startswith("calibrant: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not [p for p in place.iterdir() if p.name.startswith((".out", "out"))]
