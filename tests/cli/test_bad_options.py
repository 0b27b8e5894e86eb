"""Bad options and bad corpora get one clear sentence and status 2."""

import gzip
import sys
from pathlib import Path

import pytest

import calibrant as cb
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.cli.main import main
from tests.cli.damage import (
    refused,
)
from tests.conftest import random_set, write_tokenizer


@pytest.mark.parametrize(("options", "said"), [
    (["-r", "nonsense"], "no recipe of that name"),
    (["-r", "bad.yaml"], "no such key"),
    (["-r", "text.yaml"], "not YAML"),
    (["-r", "gptq-w4a16-g128"], "sizes that fit every layer: 32"),
    (["--group-size", 48], "does not divide"),
    (["-r", "wanda-2:4", "--bits", 3], "does not quantize"),
    (["--bits", 9], "bits"),
    (["-l", 65], "context of 64"),
    (["-n", 0], "at least 1 sample"),
    (["-c", "missing"], "not a calibration set"),
    (["-c", "foreign"], "another tokenizer"),
    (["-c", "long"], "context of 64"),
    (["--seed", -1], "seed"),
    (["--device", "tpu"], "cpu and cuda"),
    (["--dtype", "int3"], "float32"),
    (["-o", "file"], "not a folder"),
    (["-o", "full"], "--overwrite"),
])  # fmt: skip
def test_bad_options(run, llama: Path, tmp_path: Path, monkeypatch, options: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(
        "name: x\ndescription: x\nmethod: {name: gptq, dampening: 1}\nscheme: {weights: {bits: 4}}\n"
    )
    (tmp_path / "text.yaml").write_text("just: [text")
    write_tokenizer(tmp_path / "tokenizer")
    random_set(llama, length=60).save(tmp_path / "short")
    random_set(llama, length=70).save(tmp_path / "long")
    made = random_set(None)
    foreign = made.manifest.model_copy(update={"tokenizer_sha256": "0" * 64})
    CalibrationSet(made.tokens, made.mask, foreign).save(tmp_path / "foreign")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    output = [] if "-o" in options else ["-o", "out"]
    status, out, err = run("compress", llama, *output, *options, "-q")
    refused(status, out, err, said, tmp_path)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("nowhere.txt", None, "no such text file"),
    ("empty.txt", b"", "is empty"),
    ("broken.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9], "is it complete"),
    ("short.txt", b"few words", "only 0 windows"),
])  # fmt: skip
def test_bad_corpora(run, llama: Path, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    corpus = tmp_path / name
    if content is not None:
        corpus.write_bytes(content)
    status, out, err = run("data", "select", corpus, "-m", llama, "-o", tmp_path / "out", "-n", 4, "-l", 32, "-q")
    refused(status, out, err, said, tmp_path)


def test_progress_of_an_empty_corpus_and_of_one_without_files(run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    select = ["-m", llama, "-n", 2, "-l", 32, "--strategy", "zipcal"]
    status, _, err = run("data", "select", tmp_path / "empty.txt", *select, "-o", tmp_path / "none")
    assert (status, "is empty" in err, "Traceback" in err) == (2, True, False)
    status, _, err = run("data", "select", "builtin", *select, "-o", tmp_path / "out")
    assert (status, err) == (0, "")


def test_a_model_that_does_not_exist_is_not_asked_for_on_the_network(run, tmp_path: Path) -> None:
    for command in (
        ["compress", "o/n", "-o", tmp_path / "out"],
        ["evaluate", "o/n"],
        ["data", "generate", "o/n", "-o", tmp_path / "out"],
    ):
        status, out, err = run(*command, "-q")
        refused(status, out, err, "o/n", tmp_path)


def test_messages_of_several_processes_say_whose_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrant", "recipes", "no-such-recipe"])
    for environment, name in ({}, "calibrant"), ({"TORCHELASTIC_RUN_ID": "none", "RANK": "1"}, "calibrant, rank 1"):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().err.startswith(f"{name}: no-such-recipe: no recipe of that name")


@pytest.mark.parametrize("option", ["--samples", "--length", "--draw"])
def test_what_describes_a_set_is_refused_beside_one(
    llama: Path, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_set(llama).save(tmp_path / "set")
    command = ["compress", str(llama), "-c", str(tmp_path / "set"), "-o", str(tmp_path / "out"), option, "2"]
    monkeypatch.setattr(sys, "argv", ["calibrant", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"{option} describes the set that the model generates" in capsys.readouterr().err


def test_the_default_size_of_a_set_is_refused_beside_one_too(llama: Path, tmp_path: Path) -> None:
    """The default value, given by the caller, is no less given."""
    with pytest.raises(cb.CalibrantError, match="`samples` describes the set"):
        cb.prepare(llama, output=tmp_path / "out", calibration=random_set(llama), samples=128)
