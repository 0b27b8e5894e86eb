"""A study of a tiny model that takes seconds."""

import random
from pathlib import Path
from typing import Any

import yaml

_RECIPE = """name: {name}
description: d
method: {{name: {method}}}
scheme:
  {scheme}
"""


def fill(folder: Path, model: Path) -> Path:
    weights = "weights: {bits: 4, symmetric: true, group_size: 16}"
    (folder / "rtn.yaml").write_text(_RECIPE.format(name="rtn", method="rtn", scheme=weights))
    (folder / "wanda.yaml").write_text(_RECIPE.format(name="wanda", method="wanda", scheme='sparsity: "2:4"'))
    words = random.Random(0)
    lines = [" ".join(words.choices(["red", "dog", "sun", "runs", "far", "of", "a"], k=40)) for _ in range(30)]
    (folder / "text.txt").write_text("\n".join(lines))
    write_plan(folder / "study.yaml", models=str(model))
    return folder


def write_plan(path: Path, **changes: Any) -> Path:
    plan = {
        "name": "small",
        "sources": {"text": {"corpus": "text.txt"}, "vocabulary": {"strategy": "vocabulary"}},
        "draws": 1,
        "most_draws": 2,
        "samples": 4,
        "length": 16,
        "recipes": ["rtn.yaml", "wanda.yaml"],
        "texts": {"held-out": {"corpus": "text.txt", "length": 16, "windows": 3}},
        "dtype": "float32",
        **(yaml.safe_load(path.read_text()) if path.is_file() else {}),
        **changes,
    }
    path.write_text(yaml.safe_dump({name: value for name, value in plan.items() if value is not None}))
    return path
