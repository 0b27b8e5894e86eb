"""Hashes of what every built-in recipe makes of every tiny test model, to show that a change moves no byte.

    python benchmarks/output_hashes.py before.json                  # on the old commit
    python benchmarks/output_hashes.py after.json --against before.json

Files are hashed byte for byte, but for ``report.json`` (times). ``calibrant.json`` and ``README.md`` are hashed apart
under ``records``: a renamed key or a reworded note shows there and nowhere else.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tests.conftest import ARCHITECTURES, random_set, write_model

import calibrant as cb
from calibrant.hashing import sha256_file

_RECORDS = ("calibrant.json", "README.md")
_VOLATILE = ("report.json",)


def hashes_of(folder: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of an output by relative name, records apart."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _VOLATILE]
    # TensorBoard's files carry times in their names.
    files = [path for path in files if "tfevents" not in path.name]
    named = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    return {
        "files": {name: value for name, value in named.items() if name not in _RECORDS},
        "records": {name: value for name, value in named.items() if name in _RECORDS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--architectures", nargs="*", default=sorted(ARCHITECTURES))
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    arguments = parser.parse_args()
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    names = arguments.recipes or list(cb.builtin_recipes())
    with tempfile.TemporaryDirectory() as scratch:
        for architecture in arguments.architectures:
            model = write_model(
                Path(scratch) / architecture, architecture, torch.bfloat16 if architecture == "qwen3" else torch.float32
            )
            data = random_set(model, masked=3)
            for recipe in names:
                for dtype in arguments.dtypes:
                    key = f"{architecture} {recipe} {dtype}"
                    if key in found:
                        continue
                    target = Path(scratch) / "output" / recipe.replace(":", "-")
                    try:
                        cb.compress(
                            model,
                            output=target,
                            recipe=recipe,
                            calibration=data,
                            dtype=dtype,
                            overwrite=True,
                            allow_encoder=True,
                        )
                        found[key] = hashes_of(target)
                    except Exception as error:
                        found[key] = {
                            "refused": {"refused": type(error).__name__},
                            "records": {"message": str(error).replace(scratch, "")},
                        }
                    print(key, flush=True)
            arguments.output.write_text(json.dumps(found, indent=1, sort_keys=True))
    if arguments.against is not None:
        compare(json.loads(arguments.against.read_text()), found)


def compare(before: dict, after: dict) -> None:
    shared = sorted(before.keys() & after.keys())
    different = [
        key
        for key in shared
        if {k: v for k, v in before[key].items() if k != "records"}
        != {k: v for k, v in after[key].items() if k != "records"}
    ]
    records = [key for key in shared if before[key]["records"] != after[key]["records"]]
    refused = sum("refused" in before[key] for key in shared)
    print(
        f"{len(shared)} outputs compared ({refused} refusals): {len(different)} differ, "
        f"records of {len(records)} differ; {len(before.keys() - after.keys())} missing"
    )
    for key in different:
        print("differs:", key)
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
