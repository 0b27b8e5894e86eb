"""The page of one compressed model in a real browser, and what it says."""

import json
import re
import shutil
from pathlib import Path

import pytest

import calibrant as cb
from calibrant.pipeline.output import Output, place, scheme_text
from tests.browser import needs_browser, seen
from tests.conftest import random_set


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts, some of which saw no token and fell back."""
    folder = tmp_path_factory.mktemp("made") / "experts & <b>co"
    source = model_folder("qwen3_moe")
    data = random_set(source, samples=1, length=2)
    cb.compress(source, output=folder, recipe="gptq-w4a16-g32", calibration=data, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def page(made: Path, model_folder, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    cb.write_run_report(made, output=file, against=model_folder("qwen3_moe"), prompts=["ab <i>", "Once"])
    return file.read_text(encoding="utf-8")


def test_names_have_a_block_and_a_kind() -> None:
    assert place("model.layers.12.self_attn.q_proj") == ("model.layers.12", "self_attn.q_proj")
    assert place("model.layers.0.mlp.experts.7.up_proj") == ("model.layers.0", "mlp.experts.*.up_proj")
    assert place("model.layers.0.mlp.experts.3") == ("model.layers.0", "mlp.experts.*")
    assert place("lm_head") == ("", "lm_head")


def test_schemes_in_words() -> None:
    said = {name: scheme_text(recipe.scheme) for name, recipe in cb.builtin_recipes().items()}
    assert said["gptq-w4a16-g64"] == "4 bits, symmetric, groups of 64"
    assert said["awq-w4a16-g128-asym"] == "4 bits, asymmetric, groups of 128"
    assert said["rtn-w8a8"] == "8 bits, symmetric, one scale per channel; int8 activations, dynamic"
    assert said["wanda-2:4"] == "zeros 2:4"


def test_bits_on_disk_count_scales(llama: Path, tmp_path: Path) -> None:
    cb.compress(llama, output=tmp_path / "out", recipe="rtn-w8a16", group_size=32)
    bits = Output.read(tmp_path / "out").stored_bits
    assert bits is not None
    assert 8 + 32 / 32 <= bits < 8 + 32 / 32 + 0.2  # a float32 scale for 32 weights, and the shape of each layer


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_in_a_real_browser(page: str, made: Path, tmp_path: Path, width: int, dark: bool) -> None:
    probe = """
      const heat = [...document.querySelectorAll('.heat tbody tr')].map((row) =>
        [...row.children].map((cell) => [cell.textContent, cell.style.background]));
      const unnamed = [...document.querySelectorAll('table, [role=region], input, nav')].filter((e) =>
        !(e.getAttribute('aria-label') || e.labels?.length || e.closest('details') ||
          document.getElementById(e.getAttribute('aria-labelledby'))));
      const table = document.querySelector('#layers table');
      const heads = [...table.querySelectorAll('th')];
      const error = heads.findIndex((one) => one.textContent === 'relative error');
      const values = () => [...table.tBodies[0].rows].map((row) => Number(row.children[error].dataset.value));
      heads[error].querySelector('button').click();
      const up = values();
      heads[error].querySelector('button').click();
      const box = document.querySelector('#layers input');
      box.value = 'q_proj';
      box.dispatchEvent(new Event('input'));
      return { heat, unnamed: unnamed.map((e) => e.outerHTML.slice(0, 80)), up, down: values(),
        columns: [...document.querySelectorAll('.heat thead th')].map((e) => e.textContent),
        said: document.querySelector('#layers output').textContent,
        samples: [...document.querySelectorAll('section.sample')].map((e) =>
          [e.querySelector('h3').textContent, e.querySelectorAll('pre').length]),
        fallbacks: document.querySelectorAll('#fallbacks tbody tr').length,
        wide: document.documentElement.scrollWidth > window.innerWidth,
        ink: getComputedStyle(document.body).color, title: document.title, text: document.body.innerText };
    """
    found, console = seen(page, probe, width, tmp_path, dark=dark)
    assert console == []
    assert found.get("error") is None
    report = cb.RunReport.read(made)
    errors = [layer.relative_error for layer in report.layers]
    assert found["title"] == "Compressed model: experts & <b>co"
    kinds = list(dict.fromkeys(place(layer.name)[1] for layer in report.layers))
    assert found["columns"] == ["block", *kinds]  # in full, since the kinds of experts end alike
    assert [row[0][0] for row in found["heat"]] == ["0", "1"]
    q_proj = next(layer for layer in report.layers if layer.name == "model.layers.1.self_attn.q_proj")
    assert float(found["heat"][1][1][0]) == pytest.approx(q_proj.relative_error, rel=0.06)
    strengths = [float(re.findall(r"[\d.]+", cell[1])[3]) for row in found["heat"] for cell in row[1:]]
    assert max(strengths) == pytest.approx(0.6)
    assert found["up"] == sorted(errors)
    assert found["down"] == sorted(errors, reverse=True)
    assert found["said"] == f"2 of {len(errors)} rows"
    assert found["unnamed"] == []
    assert found["samples"] == [["ab <i>", 2], ["Once", 2]]
    assert found["fallbacks"] == len(report.fallbacks) > 0
    assert f"{len(report.fallbacks)} of {len(errors)} layers fell back" in found["text"]
    assert report.fallbacks[0].record.fallback in found["text"]
    assert not found["wide"]
    assert found["ink"] == ("rgb(231, 234, 238)" if dark else "rgb(29, 36, 48)")


def test_the_page_says_what_the_set_held_and_what_was_measured(llama: Path, tmp_path: Path) -> None:
    data = random_set(llama)
    out = tmp_path / "out"
    cb.compress(llama, output=out, recipe="wanda-2:4", calibration=data, dtype="float32")
    corpus = cb.Corpus(["held out text, " * 20])
    measured = cb.evaluate(out, against=llama, text=corpus, length=32, limit=3, save=True)
    page = cb.write_run_report(out)
    assert page == out / "report.html"
    first = page.read_bytes()
    text = first.decode()
    assert data.sha256 in text
    assert "8 rows of 32 tokens" in text
    assert f"3 x 32 tokens, hash {measured.windows_sha256[:8]}" in text
    assert cb.write_run_report(out).read_bytes() == first
    # A page and an evaluation are of one output: neither goes into another that is made of it.
    cb.compress(out, output=tmp_path / "next", recipe="rtn-w8a16")
    assert not {"report.html", "evaluation.json"} & {path.name for path in (tmp_path / "next").iterdir()}
    # Of another compression, the evaluation does not count.
    shutil.copy(out / "evaluation.json", tmp_path / "next")
    assert Output.read(out).evaluation == measured
    assert Output.read(tmp_path / "next").evaluation is None
    assert "uses no calibration data" in cb.write_run_report(tmp_path / "next").read_text(encoding="utf-8")
    # Without its set, the record still says what it was.
    shutil.rmtree(out / "calibration")
    text = cb.write_run_report(out).read_text(encoding="utf-8")
    assert "Rows are not shown: " in text
    assert data.sha256 in text


def test_what_is_no_output_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(cb.CalibrantError, match=r"no compressed model of Calibrant, which has a file calibrant\.json"):
        cb.write_run_report(llama)
    with pytest.raises(cb.CalibrantError, match="so `save` has nowhere to keep"):
        cb.evaluate(llama, limit=1, length=16, save=True)
    cb.compress(llama, output=tmp_path / "out", recipe="rtn-w8a16")
    with pytest.raises(cb.CalibrantError, match="name the original with `against`"):
        cb.write_run_report(tmp_path / "out", prompts=["a"])
    (tmp_path / "out" / "report.html").write_text("<p>mine</p>")
    with pytest.raises(cb.CalibrantError, match="exists and is no page of a compressed model"):
        cb.write_run_report(tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    with pytest.raises(cb.CalibrantError, match="no evaluation that can be read"):
        cb.write_run_report(tmp_path / "out", output=tmp_path / "page.html")
    (tmp_path / "out" / "evaluation.json").unlink()
    (tmp_path / "out" / "report.json").write_text(json.dumps({"seconds": {}}))
    with pytest.raises(cb.CalibrantError, match=r"report\.json: no record that calibrant"):
        cb.write_run_report(tmp_path / "out", output=tmp_path / "page.html")
