"""A command whose extra is not installed says in one sentence which extra that is."""

import sys
from pathlib import Path

import pytest

from calibrant.cli.main import main
from tests.conftest import random_set

SELECT = ["data", "select", "{text}", "-m", "{model}", "-o", "{out}", "-n", "2", "-l", "16"]
COMMANDS = {
    "cluster": ("ray", [*SELECT, "--strategy", "zipcal", "--executor", "ray"]),
    "embeddings": ("sentence_transformers", [*SELECT, "--strategy", "k-centre", "--embedding", "{folder}"]),
    "evaluation": ("lm_eval", ["evaluate", "{model}", "--text", "none", "--tasks", "piqa", "--data", "{folder}"]),
    "gguf": ("gguf", ["gguf", "{model}", "-o", "{out}.gguf"]),
    "hub": ("datasets", ["data", "select", "hub:someone/something", *SELECT[3:]]),
    "report": ("altair", ["data", "inspect", "{set}", "-m", "{model}", "--html", "{out}.html"]),
}


@pytest.mark.parametrize("extra", COMMANDS)
def test_a_missing_extra_is_named(
    llama: Path, tmp_path: Path, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, command = COMMANDS[extra]
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    text, own = tmp_path / "text.txt", tmp_path / "set"
    text.write_text("Some words of a text that is long enough for two rows. " * 20)
    random_set(llama).save(own)
    places = {"text": text, "model": llama, "out": tmp_path / "out", "folder": tmp_path, "set": own}
    monkeypatch.setattr(sys, "argv", ["calibrant", *(part.format(**places) for part in command)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"pip install 'calibrant[{extra}]'" in said
    assert said.startswith("calibrant")
