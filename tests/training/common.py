"""A short training of a tiny model: its recipe, its student and its teacher."""

from pathlib import Path
from typing import Any

import torch
import transformers

from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.whole_model import load_whole
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.recipe import Recipe
from calibrant.training.rounded_model import RoundedModel
from calibrant.training.student import Student
from calibrant.training.teacher import WholeTeacher
from tests.conftest import random_set

W4A8 = {"weights": {"bits": 4, "range_search": "mse"}, "activations": {"dynamic": True}}


CPU = torch.device("cpu")


def recipe(training: dict[str, Any], **scheme: Any) -> Recipe:
    short = {"steps": 6, "batch_size": 4, "length": 16, "eval_steps": 3, "learning_rate": 1e-3}
    return Recipe.model_validate(
        {
            "name": "r",
            "description": "d",
            "method": {**short, **training},
            "scheme": scheme or W4A8,
        }
    )


def rounded(folder: Path, chosen: Recipe) -> tuple[RoundedModel, transformers.PreTrainedModel]:
    """The student that a run would train, and its teacher."""
    opened = ModelFolder(folder, allow_encoder=True)
    lazy = LazyModel(opened, opened.dtype, CPU)
    plan = make_plan(lazy, find_blocks(lazy.module), chosen)
    return RoundedModel(load_whole(opened, "cpu", "float32"), plan), load_whole(opened, "cpu", "float32")


def student(folder: Path, chosen: Recipe) -> Student:
    assert chosen.training is not None
    watched = random_set(samples=2, length=16, seed=9)
    learner, teacher = rounded(folder, chosen)
    return Student(
        learner,
        WholeTeacher(teacher, torch.float32),
        chosen.training,
        TokenRows(watched.tokens.long(), watched.mask),
        torch.float32,
        causal=True,
    )
