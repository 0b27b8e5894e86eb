"""Sets whose making is interrupted: the same call continues, and ends with the bytes of one that nothing disturbed."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import calibrant as cb
from calibrant import checkpoint_interval
from calibrant.calibration.selection import perplexity, selector
from calibrant.calibration.selection.activations import FeedForwardMeans
from calibrant.calibration.sources import text_generation
from calibrant.cli.main import app
from calibrant.errors import CalibrantError
from calibrant.journal import Journal
from calibrant.stopping import StoppedError, stopping_gently

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"  # ends no text
)
WRITTEN = {"self": {}, "llm-qat": {}, "prefix": {"percentile": 100}, "answers": {}}
SCORED: dict[str, dict[str, Any]] = {
    "perplexity": {"percentile": 90},
    "cola": {},
    "acdm": {"targets": ["target.txt"]},
}
PORTION = 8


class _Killed(BaseException):
    pass


@pytest.fixture
def place(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that has a chat template, a corpus and a target; states are saved always."""
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    rng = np.random.default_rng(0)
    for name, lines in (("corpus.txt", 200), ("target.txt", 20)):
        text = "\n".join("".join(chr(code) for code in rng.integers(97, 123, 20)) for _ in range(lines))
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_interval, "CHECKPOINT_SHARE", 0)
    monkeypatch.setattr(selector, "_BATCH", PORTION)
    return tmp_path


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def generated(output: str, strategy: str, **options: Any) -> cb.CalibrationSet:
    given = {"samples": 8, "length": 16, "batch_size": 2, "dtype": "float32", **WRITTEN[strategy], **options}
    if strategy in ("prefix", "answers"):
        lines = Path("corpus.txt").read_text().splitlines()
        given["corpus"] = cb.Corpus([line[:7] for line in lines])
    return cb.generate("model", strategy=strategy, output=output, **given)


def selected(output: str, strategy: str, **options: Any) -> cb.CalibrationSet:
    given = {"samples": 5, "length": 16, "dtype": "float32", **SCORED[strategy], **options}
    return cb.select("corpus.txt", tokenizer="model", strategy=strategy, output=output, **given)  # type: ignore[arg-type]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first rows of the batches that are written; a number appended by the test kills the batch behind it."""
    write, begun = text_generation._Batch.write, list[int]()

    def noted(batch: Any, column: int, decoder: Any) -> None:
        if column == 1:
            begun.append(batch.first_row)
        write(batch, column, decoder)

    monkeypatch.setattr(text_generation._Batch, "write", noted)
    return begun


def killing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, action: Callable[[], None]) -> None:
    """Call ``action`` before the call number ``count`` of the function ``name``, once."""
    function, calls = vars(owner)[name], [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def kill() -> None:
    raise _Killed


@pytest.mark.parametrize("strategy", WRITTEN)
def test_rows_that_are_written_are_not_written_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int], strategy: str
) -> None:
    whole = generated("whole", strategy)
    assert files("whole").keys() == {"manifest.json", "tokens.safetensors"}
    killing(monkeypatch, text_generation._Batch, "write", 15 * 2 + 5, kill)
    with pytest.raises(_Killed):
        generated("parts", strategy)
    assert not Path("parts").exists()
    found = cb.status("parts")
    assert (found.state, found.strategy, found.done) == ("interrupted", strategy, "a part of the calibration set")
    begun = len(batches)
    again = generated("parts", strategy)
    assert batches[begun:][0] == 4
    assert again.sha256 == whole.sha256
    assert files("parts") == files("whole")
    assert not Path("parts.journal").exists()
    assert cb.status("parts").sentence() == f"parts: finished, calibration set of {strategy}"


@pytest.mark.parametrize("strategy", SCORED)
def test_scores_of_a_model_are_not_computed_again(place: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    whole = selected("whole", strategy)
    owner: Any = perplexity if strategy == "perplexity" else FeedForwardMeans
    name, rows = ("row_losses", 1) if strategy == "perplexity" else ("of", PORTION)
    before = 1 if strategy == "acdm" else 0  # the target's windows
    killing(monkeypatch, owner, name, before + 3 * PORTION // rows + 1, kill)
    with pytest.raises(_Killed):
        selected("parts", strategy)
    assert cb.status("parts").done == f"the scores of {3 * PORTION} candidates"
    calls = [0]
    function = vars(owner)[name]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    assert selected("parts", strategy).sha256 == whole.sha256
    candidates = whole.manifest.counts["candidates"]
    assert calls[0] == before + -(-(candidates - 3 * PORTION) // rows)
    assert files("parts") == files("whole")
    assert not Path("parts.journal").exists()


def test_a_signal_stops_a_selection_where_it_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_interval, "CHECKPOINT_SHARE", 1e9)
    selected("whole", "perplexity")
    killing(monkeypatch, perplexity, "row_losses", 2 * PORTION - 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with (
        pytest.raises(StoppedError, match="stopped after the scores of 16 candidates"),
        stopping_gently(lambda text: None),
    ):
        selected("parts", "perplexity")
    shown = CliRunner().invoke(app, ["status", "parts"]).stdout
    assert "interrupted, calibration set of perplexity; saved: the scores of 16 candidates" in " ".join(shown.split())
    selected("parts", "perplexity")
    assert files("parts") == files("whole")


def test_another_corpus_model_or_request_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killing(monkeypatch, perplexity, "row_losses", 3 * PORTION, kill)
    with pytest.raises(_Killed):
        selected("parts", "perplexity")
    with pytest.raises(CalibrantError, match=r"set\.request\.samples is 5 there and 6 here"):
        selected("parts", "perplexity", samples=6)
    text = Path("corpus.txt").read_text()
    Path("corpus.txt").write_text(text + "more of it\n")
    with pytest.raises(CalibrantError, match=r"set\.corpora\[0\]\.files\.corpus\.txt is"):
        selected("parts", "perplexity")
    Path("corpus.txt").write_text(text)
    with pytest.raises(CalibrantError, match=r"set\.corpora is .* and \[\] here"):
        generated("parts", "self")
    selected("parts", "perplexity", samples=6, overwrite=True)
    assert not Path("parts.journal").exists()


def test_the_commands_go_on_too(place: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int]) -> None:
    size = ["--samples", "6", "--length", "16", "--batch-size", "2"]
    command = ["data", "generate", "model", *size, "--dtype", "float32", "-o"]
    assert CliRunner().invoke(app, [*command, "whole"]).exit_code == 0
    killing(monkeypatch, text_generation._Batch, "write", 15 + 5, kill)
    with pytest.raises(_Killed):
        CliRunner().invoke(app, [*command, "parts"])
    assert CliRunner().invoke(app, [*command, "parts"]).exit_code == 0
    assert files("parts") == files("whole")


def killed_selection(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    killing(monkeypatch, perplexity, "row_losses", 3 * PORTION, kill)
    with pytest.raises(_Killed):
        selected("parts", "perplexity", **options)


def test_another_tokenizer_or_evaluation_text_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("leak.txt").write_text("a text of the evaluation that nothing else has\n")
    options: dict[str, Any] = {"filters": cb.FilterRequest(leakage=("leak.txt",))}
    killed_selection(monkeypatch, **options)
    Path("leak.txt").write_text(Path("corpus.txt").read_text()[:200])
    with pytest.raises(CalibrantError, match=r"set\.leakage\[0\]\.files\.leak\.txt is"):
        selected("parts", "perplexity", **options)
    Path("leak.txt").write_text("a text of the evaluation that nothing else has\n")
    settings = json.loads(Path("model/tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    Path("model/tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(CalibrantError, match=r"set\.tokenizer\.files_sha256 is"):
        selected("parts", "perplexity", **options)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (torch.zeros(24, 3), "24 scores that are not of these candidates"),
        (torch.zeros(9999), "9999 scores that are not of these candidates"),
        (torch.zeros(7), "7 scores of 24 candidates"),
    ],
)
def test_scores_of_other_candidates_are_damage(
    place: Path, monkeypatch: pytest.MonkeyPatch, scores: torch.Tensor, said: str
) -> None:
    killed_selection(monkeypatch)
    journal = Journal(Path("parts"), {}, False)
    done = 24 if len(scores) < 24 else len(scores)
    journal.write("scores-1", {"done": done, "scores": scores})
    with pytest.raises(CalibrantError, match=rf"parts\.journal: damaged \({said}\); delete .*parts\.journal to begin"):
        selected("parts", "perplexity")


def test_a_model_is_not_compressed_into_the_place_of_a_set(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_selection(monkeypatch)
    with pytest.raises(CalibrantError, match=r"it makes a calibration set, not a compression"):
        cb.compress("model", output="parts", recipe="rtn-w8a16")


def test_other_versions_do_not_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_selection(monkeypatch)
    monkeypatch.setattr("calibrant.calibration.saved_set.set_library_versions", lambda: {"torch": "1"})
    with pytest.raises(CalibrantError, match=r"libraries\.\w+ is"):
        selected("parts", "perplexity")
