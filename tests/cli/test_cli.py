"""The command line as a user meets it: results, and one clear sentence with status 2 for every bad input."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.cli import main as cli
from calibrant.engine.checkpoint_writer import CheckpointWriter
from calibrant.errors import CalibrantError
from calibrant.output_folder import staged
from tests.conftest import random_set, write_tokenizer

ENTRY = "from calibrant.cli.main import main; main()"


def call(
    *arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["calibrant", *map(str, arguments)])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_help_needs_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "numba", "rich.table")
    code = f"import sys, calibrant.cli.main; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


COMMANDS = [
    "",
    "compress",
    "data",
    "data generate",
    "data select",
    "data score",
    "data rebuild",
    "data inspect",
    "evaluate",
    "imatrix",
    "recipes",
    "demo",
]


@pytest.mark.parametrize("command", [name.split() for name in COMMANDS], ids=COMMANDS)
def test_every_command_explains_itself(run, command: list[str]) -> None:
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert "Usage" in out
    if command and command != ["data"]:
        assert "Example: calibrant" in " ".join(out.split())


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


def test_what_is_in_the_way_of_a_journal_is_seen_before_anything(run, llama: Path, tmp_path: Path) -> None:
    arguments = ("compress", llama, "-r", "zsaq-w4a8", "-o", tmp_path / "out", "--dry-run", "-q")
    assert run(*arguments)[0] == 0
    (tmp_path / "out.training").mkdir()
    assert run(*arguments)[0] == 0
    (tmp_path / "out.training" / "mine.txt").write_text("mine")
    status, out, err = run(*arguments)
    assert status == 2
    assert "in the way of the training's journal" in out + err


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


def test_a_file_is_no_model(run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    status, _, err = run("compress", tmp_path / "model.gguf", "-o", tmp_path / "out")
    assert status == 2
    assert "is a file; a model is a folder" in err


def test_quiet_is_quiet_and_a_dry_run_writes_nothing(run, llama: Path, tmp_path: Path) -> None:
    status, out, err = run("compress", llama, "-o", tmp_path / "out", "-r", "rtn-w8a8", "-q")
    assert (status, out, err) == (0, "", "")
    status, out, _ = run("compress", llama, "-o", tmp_path / "dry", "--dry-run", "--json")
    assert status == 0
    assert json.loads(out)["memory_bytes"] > 0
    assert not (tmp_path / "dry").exists()


def test_a_recipe_from_a_file(run, llama: Path, tmp_path: Path) -> None:
    _, shown, _ = run("recipes", "wanda-2:4")
    (tmp_path / "mine.yaml").write_text(shown)
    status, _, _ = run("compress", llama, "-r", tmp_path / "mine.yaml", "-o", tmp_path / "out", "-n", 4, "-l", 16, "-q")
    assert status == 0


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
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def escaping_shard(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def edited_config(**changes: object):
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


@pytest.mark.parametrize(("damage", "said"), [
    (no_config, "config.json is missing"),
    (no_weights, "only safetensors"),
    (truncated, "truncated"),
    (header_only, "not a complete safetensors"),
    (edited_header(shape=["a"]), "damaged safetensors header at model.norm.weight"),
    (edited_header(dtype=5), "damaged safetensors header at model.norm.weight"),
    (missing_shard, "shard is missing"),
    (escaping_shard, "leaves the folder"),
    (edited_config(architectures=["BertForSequenceClassification"]), "not a causal language model"),
    (edited_config(model_type="nonsense"), "config.json"),
    (edited_config(quantization_config={"quant_method": "gptq"}), "quantized already"),
    (edited_config(num_hidden_layers=3), "no weights for"),
])  # fmt: skip
def test_damaged_models(run, llama: Path, tmp_path: Path, damage, said: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    damage(model)
    status, out, err = run("compress", model, "-o", tmp_path / "out", "-q", "-n", 2, "-l", 8)
    refused(status, out, err, said, tmp_path)


def test_a_mixture_of_experts_without_its_attention(run, model_folder, tmp_path: Path) -> None:
    model = shutil.copytree(model_folder("mixtral"), tmp_path / "model")
    without("model.layers.1.self_attn.q_proj.weight")(model)
    status, out, err = run("compress", model, "-r", "rtn-w8a8", "-o", tmp_path / "out", "-q")
    refused(status, out, err, "no weights for model.layers.1.self_attn.q_proj.weight", tmp_path)


def test_generate_refuses_what_gives_no_text(run, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    status, out, err = run("data", "generate", model, "-o", tmp_path / "out", "-n", 2, "-l", 8, "-q")
    refused(status, out, err, "not finite", tmp_path)
    status, out, err = run("data", "generate", llama, "-o", tmp_path / ("out" + 400 * "x"), "-n", 2, "-l", 8, "-q")
    refused(status, out, err, "File name too long", tmp_path)


def refused(status: int, out: str, err: str, said: str, place: Path) -> None:
    assert status == 2
    assert said in err
    assert err.startswith("calibrant: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not [p for p in place.iterdir() if p.name.startswith((".out", "out"))]


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
    ("nowhere.txt", None, "no such corpus"),
    ("empty.txt", b"", "is empty"),
    ("broken.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], "is it complete"),
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


def test_a_page_replaces_pages_only(run, llama: Path, tmp_path: Path) -> None:
    random_set(llama).save(tmp_path / "set")
    page, other = tmp_path / "page.html", tmp_path / "corpus.csv"
    other.write_text("precious")
    for _ in range(2):
        assert run("data", "inspect", tmp_path / "set", "-m", llama, "--html", page, "-q")[0] == 0
    for place, said in (
        (other, "is no page"),
        (tmp_path / "no" / "x.html", "no such folder"),
        (tmp_path, "is no page"),
    ):
        status, _, err = run("data", "inspect", tmp_path / "set", "-m", llama, "--html", place, "-q")
        assert (status, said in err) == (2, True)
    assert other.read_text() == "precious"


def test_corpora_are_scored(run, llama: Path, tmp_path: Path) -> None:
    for name, words in (("near", "apples and pears"), ("far", "0123 4567"), ("target", "pears and apples")):
        (tmp_path / f"{name}.txt").write_text(f"{words} " * 20)
    files = [tmp_path / "far.txt", tmp_path / "near.txt"]
    status, out, err = run("data", "score", *files, "-m", llama, "--target", tmp_path / "target.txt", "--json", "-q")
    assert (status, err) == (0, "")
    assert [one["corpus"] for one in json.loads(out)["scores"]] == [str(files[1]), str(files[0])]
    status, _, err = run("data", "score", *files, "-m", llama, "--target", tmp_path / "no.txt", "-q")
    assert (status, "no such corpus" in err) == (2, True)


def test_a_model_that_does_not_exist_is_not_asked_for_on_the_network(run, tmp_path: Path) -> None:
    for command in (
        ["compress", "o/n", "-o", tmp_path / "out"],
        ["evaluate", "o/n"],
        ["data", "generate", "o/n", "-o", tmp_path / "out"],
    ):
        status, out, err = run(*command, "-q")
        refused(status, out, err, "o/n", tmp_path)


def test_inputs_are_never_replaced(run, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "deep" / "model")
    for target in (model, tmp_path / "deep"):
        select = ["data", "select", model, "-m", model]
        for command in (["compress", model, "-r", "rtn-w8a8"], ["data", "generate", model], select):
            status, _, err = run(*command, "-o", target, "--overwrite", "-q")
            assert status == 2
            assert "holds the input" in err
    assert (model / "model.safetensors").is_file()


def test_calibration_sets_and_recipes_are_never_replaced(run, llama: Path, tmp_path: Path) -> None:
    random_set(llama).save(tmp_path / "set")
    kept = (tmp_path / "set" / "tokens.safetensors").read_bytes()
    status, _, err = run("compress", llama, "-c", tmp_path / "set", "-o", tmp_path / "set", "--overwrite", "-q")
    assert status == 2
    assert "holds the input" in err
    assert (tmp_path / "set" / "tokens.safetensors").read_bytes() == kept


def test_only_earlier_outputs_are_overwritten(run, llama: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"x")
    status, out, err = run("compress", llama, "-r", "rtn-w8a8", "-o", photos, "--overwrite", "-q")
    refused(status, out, err, "no earlier output", photos)
    assert (photos / "a.jpg").is_file()
    for _ in range(2):
        assert run("compress", llama, "-r", "rtn-w8a8", "-o", tmp_path / "out", "--overwrite", "-q")[0] == 0
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_appears_during_the_run_is_kept(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious.txt").write_text("")

    with pytest.raises(CalibrantError, match="`overwrite=True` replaces it"):
        interrupted()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]


def test_asymmetric_models_are_evaluated(run, llama: Path, tmp_path: Path) -> None:
    options = ["-r", "gptq-w4a16-g128-asym", "--group-size", 32, "-n", 4, "-l", 32]
    status, _, err = run("compress", llama, *options, "-o", tmp_path / "out")
    assert status == 0
    assert "dequantize=True" in err
    assert run("evaluate", tmp_path / "out", "--against", llama, "--length", 32, "--limit", 2, "-q")[0] == 0


def test_missing_weights_are_not_made_up(run, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for command in (["evaluate", model, "--length", 32], ["data", "generate", model, "-o", tmp_path / "out"]):
        status, out, err = run(*command, "-q")
        refused(status, out, err, "lack model.norm.weight", tmp_path)


@pytest.mark.parametrize("setting", ['"rope_theta": Infinity', '"hidden_act": "none"', '"hidden_size": -64'])
def test_configs_that_make_no_model(run, llama: Path, tmp_path: Path, setting: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    text = (model / "config.json").read_text().rstrip().removesuffix("}").rstrip()
    name = setting.partition(":")[0]
    kept = "\n".join(line for line in text.splitlines() if name not in line).rstrip(",")
    (model / "config.json").write_text(kept + ",\n" + setting + "}")
    status, out, err = run("compress", model, "-r", "rtn-w8a8", "-o", tmp_path / "out", "-q")
    refused(status, out, err, "config.json", tmp_path)


@pytest.mark.parametrize(("damage", "options", "said"), [
    (truncated, [], "truncated"),
    (no_weights, [], "only safetensors"),
    (edited_config(vocab_size=50), [], "vocabulary"),
    (edited_config(hidden_size="64"), [], "config.json"),
    (edited_config(architectures=5), [], "not a causal language model"),
    (edited_config(), ["--length", 65], "context of 64"),
    (edited_config(), ["--length", 1], "at least 2"),
    (edited_config(), ["--text", "nowhere.txt"], "no such corpus"),
])  # fmt: skip
def test_evaluate_refuses_bad_input(run, llama: Path, tmp_path: Path, damage, options: list[str], said: str) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    damage(model)
    status, out, err = run("evaluate", model, "--length", 32, *options, "-q")
    refused(status, out, err, said, tmp_path)


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


def test_a_full_disk(run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from calibrant.formats import shards

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    status, out, err = run("compress", llama, "-o", tmp_path / "out", "-r", "rtn-w8a8", "-q")
    refused(status, out, err, "no space left", tmp_path)


def test_an_interrupt_leaves_nothing_behind(run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write_block", interrupted)
    status, _, err = run("compress", llama, "-o", tmp_path / "out", "-r", "rtn-w8a8", "-q")
    assert status == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_the_seed_is_a_trainings_also_of_a_recipe_file_that_was_shown(run, llama: Path, tmp_path: Path) -> None:
    _, shown, _ = run("recipes", "zsaq-w4a8")
    (tmp_path / "mine.yaml").write_text(shown.replace("steps: 200", "steps: 1").replace("length: 64", "length: 16"))
    status, _, err = run(
        "compress", llama, "-r", tmp_path / "mine.yaml", "-o", tmp_path / "out", "--seed", 7, "--bits", 2
    )
    assert status == 0, err
    assert json.loads((tmp_path / "out" / "calibrant.json").read_text())["recipe"]["training"]["seed"] == 7
