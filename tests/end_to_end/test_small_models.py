"""The small models that come with the studies: what was trained, what outliers cost them, and what brings it back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from studies.outliers import found_share, plant

import calibrant as cb
from calibrant.calibration.corpus import BUILTIN
from calibrant.recipes.recipe import Recipe

MODELS = Path(__file__).parents[2] / "studies" / "small_models"
GPT2, BERT = MODELS / "gpt2-shaped", MODELS / "bert-classifier"
CHANNELS, FACTOR = 4, 128.0


def w8a8(transforms: list[dict[str, Any]]) -> Recipe:
    scheme = {"weights": {"bits": 8}, "activations": {"dynamic": False}}
    said = {"name": "r", "description": "d", "transforms": transforms, "scheme": scheme}
    return Recipe.model_validate({**said, "method": {"name": "rtn"}})


def log_loss(folder: Path) -> float:
    result = cb.evaluate(folder, length=128, limit=24)
    return float(torch.tensor(result.perplexity.value, dtype=torch.float64).log())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("planted") / "gpt2"
    return folder, plant(GPT2, folder, CHANNELS, FACTOR)


def test_planting_changes_no_function(planted: tuple[Path, dict[str, list[int]]]) -> None:
    ids = torch.randint(2, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        before, after = (load(folder, dtype=torch.float32)(ids).logits for folder in (GPT2, planted[0]))
    assert torch.equal(before, after)
    assert len(planted[1]) == 12


def test_quadapter_finds_planted_channels_and_undoes_their_harm(
    planted: tuple[Path, dict[str, list[int]]], tmp_path: Path
) -> None:
    """At least 90 % of the perplexity that static W8A8 loses to them (the log loss beyond that without them).

    Calibrated and measured on the same built-in text: it is about outliers, not about text.
    """
    model, channels = planted
    data = cb.select(BUILTIN, tokenizer=model, samples=16, length=128)
    for name, source, transforms in (
        ("clean", GPT2, []),
        ("plain", model, []),
        ("quadapter", model, [{"name": "quadapter"}]),
    ):
        cb.compress(source, output=tmp_path / name, recipe=w8a8(transforms), calibration=data)
    clean, plain, quadapter = (log_loss(tmp_path / name) for name in ("clean", "plain", "quadapter"))
    assert plain - clean > 0.1
    assert plain - quadapter >= 0.9 * (plain - clean)
    assert found_share(channels, model, tmp_path / "quadapter") >= 0.9


def test_the_classifier_can_be_trained_without_data_by_the_language_model(tmp_path: Path) -> None:
    """Two bits harm it; ZSAQ against the language model brings it closer on text that neither wrote."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BERT)
    questions = [
        "What is the capital of a country called?",
        "Which planet is closest to the sun?\nMercury\nVenus\nEarth\nMars",
        "If x + 3 = 7, what is x?\n1\n2\n3\n4",
        "Which organ pumps blood through the body?\nheart\nliver\nlung\nkidney",
        "The price of a good rises when demand\nrises\nfalls\nstays\nvanishes",
        "A contract needs an offer and\nan acceptance\na crime\na tort\na court",
    ]
    read = tokenizer(questions, padding=True, return_tensors="pt")
    generated = {
        "name": "zsaq",
        "generator": str(GPT2),
        "steps": 40,
        "batch_size": 8,
        "length": 64,
        "learning_rate": 3e-4,
    }
    scheme = {"weights": {"bits": 2, "group_size": 32, "range_search": "mse"}, "activations": {"dynamic": True}}
    answers = {"original": _answers(BERT, read)}
    for name, method in {"rounded": {"name": "rtn"}, "zsaq": generated}.items():
        said = {"name": "r", "description": "d", "method": method, "scheme": scheme}
        recipe = Recipe.model_validate(said)
        cb.compress(BERT, output=tmp_path / name, recipe=recipe, allow_encoder=True)
        answers[name] = _answers(tmp_path / name, read)
    apart = {
        name: float((answers["original"].exp() * (answers["original"] - answers[name])).sum(-1).mean())
        for name in ("rounded", "zsaq")
    }
    assert apart["rounded"] > 0.05
    assert apart["zsaq"] < 0.8 * apart["rounded"]


def _answers(folder: Path, read: Any) -> torch.Tensor:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(**{name: read[name] for name in ("input_ids", "attention_mask")}).logits
    return torch.log_softmax(logits, -1)
