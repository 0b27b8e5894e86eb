"""The commands as a user meets them, from a model to a result."""

import json
from pathlib import Path

from calibrant.calibration.calibration_set import CalibrationSet
from tests.cli.damage import refused
from tests.conftest import random_set


def test_the_whole_way(run, llama: Path, tmp_path: Path) -> None:
    made, out = tmp_path / "set", tmp_path / "out"
    status, _, _ = run("data", "generate", llama, "-o", made, "-n", 8, "-l", 32, "--seed", 1, "-q")
    assert status == 0
    status, shown, _ = run("compress", llama, "-c", made, "-o", out, "-r", "gptq-w4a16-g32", "--json")
    report = json.loads(shown)
    assert status == 0
    assert report["tensors_verified"] > 0
    assert {"forward", "statistics", "solve", "write", "verify"} <= set(report["seconds"])
    status, shown, _ = run("evaluate", out, "--against", llama, "--length", 32, "--limit", 4, "--json")
    assert status == 0
    assert json.loads(shown)["divergence"]["kl_mean"] > 0
    page = tmp_path / "page.html"
    status, shown, _ = run("data", "inspect", out / "calibration", made, "--html", page, "--json")
    assert status == 0
    assert json.loads(shown)["sets"][0]["set_sha256"] == json.loads(shown)["sets"][1]["set_sha256"]
    assert page.read_text().startswith("<!doctype html>")


def test_select_and_rebuild(run, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "c.jsonl"
    text.write_text("".join(json.dumps({"text": f"number {i} and some words"}) + "\n" for i in range(90)))
    options = ["--strategy", "zipcal", "--duplicates", "near", "-n", 4, "-l", 32]
    status, _, _ = run("data", "select", text, "-m", llama, "-o", tmp_path / "set", *options, "-q")
    assert status == 0
    status, _, _ = run("data", "rebuild", tmp_path / "set", "-o", tmp_path / "again", "-q")
    assert status == 0
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("set", "again")]
    assert manifests[0] == manifests[1]
    text.write_text(text.read_text().replace("words", "other words"))
    status, out, err = run("data", "rebuild", tmp_path / "set", "-o", tmp_path / "out", "-q")
    refused(status, out, err, "Changed: the corpus file c.jsonl", tmp_path)
    status, out, err = run("data", "select", text, "-m", llama, "-o", tmp_path / "out", "--strategy", "best", "-q")
    refused(status, out, err, "strategy 'best'", tmp_path)


def test_draws_begin_a_stride_apart(run, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "c.jsonl"
    text.write_text("".join(json.dumps({"text": f"number {i} and some words"}) + "\n" for i in range(90)))
    select = ("data", "select", text, "-m", llama, "-l", 32, "-q", "--draw", 1)
    for name, samples in (("two", 2), ("eight", 8)):
        assert run(*select, "-o", tmp_path / name, "-n", samples, "--stride", 10)[0] == 0
    two, eight = (CalibrationSet.load(tmp_path / name) for name in ("two", "eight"))
    assert two.sha256 == eight.head(2).sha256
    assert two.manifest.parameters["stride"] == 10
    status, out, err = run(*select, "-o", tmp_path / "out", "-n", 8, "--stride", 4)
    refused(status, out, err, "use --stride 8 or more", tmp_path)
    status, out, err = run(*select, "-o", tmp_path / "out", "-n", 8)
    refused(status, out, err, "use a smaller --stride", tmp_path)


def test_the_summary_names_what_matters(run, llama: Path, tmp_path: Path) -> None:
    status, shown, _ = run("compress", llama, "-o", tmp_path / "out", "-n", 4, "-l", 16)
    assert status == 0
    for word in ("size", "time", "peak memory", "worst layers", "fell back", "verified"):
        assert word in shown


def test_what_a_run_chose_is_said(run, llama: Path, tmp_path: Path) -> None:
    made = ["-n", 4, "-l", 16]
    status, _, said = run("compress", llama, "-o", tmp_path / "narrow", "-r", "2ssp-25", *made)
    assert status == 0
    assert "MLPs narrowed from 96 to" in said
    status, out, _ = run("compress", llama, "-o", tmp_path / "mixed", "-r", "gptq-w4a16-budget", "--json", *made)
    assert status == 0
    assert any(note.startswith("budget: bits of groups of layers") for note in json.loads(out)["notes"])
    chosen = json.loads((tmp_path / "mixed" / "calibrant.json").read_text())
    by_group = zip(chosen["budget"]["sensitivities"], chosen["budget"]["chosen"], strict=True)
    bits = {layer: choice for group, choice in by_group for layer in group["layers"]}
    assert {layer["name"]: layer["bits"] for layer in chosen["layers"]} == bits


def test_quiet_is_quiet_and_a_dry_run_writes_nothing(run, llama: Path, tmp_path: Path) -> None:
    status, out, err = run("compress", llama, "-o", tmp_path / "out", "-r", "rtn-w8a8", "-q")
    assert (status, out, err) == (0, "", "")
    status, out, _ = run("compress", llama, "-o", tmp_path / "dry", "--dry-run", "--json")
    assert status == 0
    assert json.loads(out)["memory_bytes"] > 0
    assert not (tmp_path / "dry").exists()


def test_what_a_recipe_without_data_ignores_is_said(run, llama: Path, tmp_path: Path) -> None:
    _, _, said = run("compress", llama, "-r", "rtn-w8a8", "-o", tmp_path / "out", "-n", 4, "-l", 16, "--dry-run")
    assert "rtn-w8a8 uses no data; ignored: --samples, --length" in said
    _, _, said = run("compress", llama, "-r", "rtn-w8a8", "-o", tmp_path / "out", "--dry-run")
    assert "ignored" not in said


def test_a_recipe_from_a_file(run, llama: Path, tmp_path: Path) -> None:
    _, shown, _ = run("recipes", "wanda-2:4")
    (tmp_path / "mine.yaml").write_text(shown)
    status, _, _ = run("compress", llama, "-r", tmp_path / "mine.yaml", "-o", tmp_path / "out", "-n", 4, "-l", 16, "-q")
    assert status == 0


def test_corpora_are_scored(run, llama: Path, tmp_path: Path) -> None:
    for name, words in (("near", "apples and pears"), ("far", "0123 4567"), ("target", "pears and apples")):
        (tmp_path / f"{name}.txt").write_text(f"{words} " * 20)
    files = [tmp_path / "far.txt", tmp_path / "near.txt"]
    status, out, err = run("data", "score", *files, "-m", llama, "--target", tmp_path / "target.txt", "--json", "-q")
    assert (status, err) == (0, "")
    assert [one["corpus"] for one in json.loads(out)["scores"]] == [str(files[1]), str(files[0])]
    status, _, err = run("data", "score", *files, "-m", llama, "--target", tmp_path / "no.txt", "-q")
    assert (status, "no such text file" in err) == (2, True)


def test_asymmetric_models_are_evaluated(run, llama: Path, tmp_path: Path) -> None:
    options = ["-r", "gptq-w4a16-g128-asym", "--group-size", 32, "-n", 4, "-l", 32]
    status, _, err = run("compress", llama, *options, "-o", tmp_path / "out")
    assert status == 0
    assert "dequantize=True" in err
    assert run("evaluate", tmp_path / "out", "--against", llama, "--length", 32, "--limit", 2, "-q")[0] == 0


def test_one_window_has_no_interval(run, llama: Path) -> None:
    status, out, _ = run("evaluate", llama, "--against", llama, "--length", 32, "--limit", 1, "--json")
    assert status == 0
    assert json.loads(out)["perplexity"]["low"] is None
    status, out, _ = run("evaluate", llama, "--against", llama, "--length", 32, "--limit", 1)
    assert status == 0


def test_brackets_in_text_are_shown_as_they_are(run, llama: Path, tmp_path: Path) -> None:
    from calibrant.modeling.tokenizer import Tokenizer

    made = random_set(llama, samples=1, length=10)
    tokens = made.tokens.clone()
    tokens[0] = tokens.new_tensor(Tokenizer(llama).encode("[/INST][x]"))
    CalibrationSet.build(tokens, made.mask, made.manifest).save(tmp_path / "set")
    status, out, _ = run("data", "inspect", tmp_path / "set", "-m", llama, "--html", tmp_path / "p.html")
    assert status == 0
    assert "[/INST][x]" in out


def test_the_seed_is_a_trainings_also_of_a_recipe_file_that_was_shown(run, llama: Path, tmp_path: Path) -> None:
    _, shown, _ = run("recipes", "zsaq-w4a8")
    (tmp_path / "mine.yaml").write_text(shown.replace("steps: 200", "steps: 1").replace("length: 64", "length: 16"))
    status, _, err = run(
        "compress", llama, "-r", tmp_path / "mine.yaml", "-o", tmp_path / "out", "--seed", 7, "--bits", 2
    )
    assert status == 0, err
    assert json.loads((tmp_path / "out" / "calibrant.json").read_text())["recipe"]["method"]["seed"] == 7
