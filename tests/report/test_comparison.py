"""Compressed models side by side: values, the page in a real browser, and what is refused."""

import json
from pathlib import Path

import pytest

import calibrant as cb
from tests.browser import needs_browser, seen
from tests.conftest import random_set

TEXT = ["held out text, " * 20]


@pytest.fixture(scope="module")
def outputs(model_folder, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two recipes on one set, one on another set, and one without data."""
    source, folder = model_folder("llama"), tmp_path_factory.mktemp("outputs")
    first, second = random_set(source), random_set(source, seed=1)
    runs = {"gptq": ("gptq-w4a16-g32", first), "wanda": ("wanda-2:4", first), "other": ("wanda-2:4", second)}
    for name, (recipe, data) in runs.items():
        cb.compress(source, output=folder / name, recipe=recipe, calibration=data, dtype="float32")
    cb.compress(source, output=folder / "rtn", recipe="rtn-w8a16")
    return [folder / name for name in (*runs, "rtn")]


def test_what_folders_record_stands_side_by_side(outputs: list[Path], llama: Path) -> None:
    found = cb.compare(outputs)
    assert list(found.outputs) == ["gptq", "wanda", "other", "rtn"]
    assert found.findings == ["gptq and wanda were made with the same calibration set."]
    models, errors, quality, fallbacks = found.tables
    names = [column.name for column in models.columns]
    for row, folder in zip(models.rows, outputs, strict=True):
        cells, report = dict(zip(names, row, strict=True)), cb.RunReport.read(folder)
        assert cells["size, MB"] == report.bytes_after / 1e6
        assert cells["seconds"] == pytest.approx(sum(report.seconds.values()))
        assert cells["fallbacks"] == 0
    assert [row[0] for row in errors.rows][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    own = [layer.relative_error for layer in cb.RunReport.read(outputs[1]).layers if "up_proj" in layer.name]
    assert next(row for row in errors.rows if row[0] == "mlp.up_proj")[2] == pytest.approx(sum(own) / len(own))
    assert "not measured alike" in errors.about
    assert quality.rows == fallbacks.rows == ()
    json.dumps(found.as_json(), allow_nan=False)


def test_an_evaluation_is_that_of_evaluate(outputs: list[Path], llama: Path) -> None:
    settings = {"against": llama, "text": cb.Corpus(TEXT), "length": 32, "limit": 3}
    found = cb.compare(outputs[:2], **settings)
    for name, folder in zip(found.outputs, outputs, strict=False):
        assert found.evaluations[name] == cb.evaluate(folder, **settings)
    assert found.findings[1].startswith("gptq is nearer to the original: KL ")
    assert [row[0] for row in found.tables[2].rows] == ["gptq", "wanda"]


def test_evaluations_of_other_texts_are_not_compared(outputs: list[Path], llama: Path) -> None:
    for folder, text in zip(outputs[:2], (TEXT, ["another text. " * 20]), strict=True):
        cb.evaluate(folder, against=llama, text=cb.Corpus(text), length=32, limit=3, save=True)
    try:
        assert "The evaluations are not of the same text, so they do not compare." in cb.compare(outputs[:2]).findings
    finally:
        for folder in outputs[:2]:
            (folder / "evaluation.json").unlink()


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_in_a_real_browser(outputs: list[Path], tmp_path: Path, width: int, dark: bool) -> None:
    page = cb.compare(outputs).write_page(tmp_path / "page.html").read_text(encoding="utf-8")
    probe = """
      const table = document.querySelector('#models table');
      const heads = [...table.querySelectorAll('th')];
      const size = heads.findIndex((one) => one.textContent === 'size, MB');
      heads[size].querySelector('button').click();
      return { order: [...table.tBodies[0].rows].map((row) => row.children[0].textContent),
        sections: [...document.querySelectorAll('section.table')].map((e) => e.id),
        unnamed: [...document.querySelectorAll('table, [role=region]')].filter((e) =>
          !document.getElementById(e.getAttribute('aria-labelledby'))).length,
        wide: document.documentElement.scrollWidth > window.innerWidth, text: document.body.innerText };
    """
    found, console = seen(page, probe, width, tmp_path, dark=dark)
    assert console == []
    assert found.get("error") is None
    sizes = {folder.name: cb.RunReport.read(folder).bytes_after for folder in outputs}
    assert found["order"] == sorted(sizes, key=lambda name: sizes[name])
    assert found["sections"] == ["models", "errors", "quality", "fallbacks"]
    assert found["unnamed"] == 0
    assert not found["wide"]
    assert "gptq and wanda were made with the same calibration set." in found["text"]


def test_what_cannot_be_compared_is_refused(outputs: list[Path], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(cb.CalibrantError, match="no compressed model of Calibrant"):
        cb.compare([outputs[0], llama])
    with pytest.raises(cb.CalibrantError, match="named twice"):
        cb.compare([outputs[0], outputs[0]])
    with pytest.raises(cb.CalibrantError, match="no compressed model is named"):
        cb.compare([])
    (tmp_path / "page.html").write_text("<p>mine</p>")
    with pytest.raises(cb.CalibrantError, match="exists and is no page of a comparison"):
        cb.compare(outputs).write_page(tmp_path / "page.html")


def test_models_of_other_originals_are_named(outputs: list[Path], model_folder, tmp_path: Path) -> None:
    cb.compress(model_folder("gpt2"), output=tmp_path / "gpt2", recipe="rtn-w8a16")
    assert cb.compare([outputs[3], tmp_path / "gpt2"]).findings == [
        "These were not made from the same original, so their errors do not compare: rtn; gpt2."
    ]
