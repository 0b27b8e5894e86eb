"""The report of a study: the page in a real browser, and its tables as files."""

import csv
import re
from pathlib import Path

import pytest

import calibrant as cb
from calibrant.report.tables import Column, Estimate, Table, Undefined, as_csv, as_latex, as_markdown
from tests.browser import needs_browser, seen
from tests.report.study_store import plan, write_study

HOSTILE = "m</script><img src=x onerror=alert(1)> & more"
DRAWN = """
  const drawn = async () => { while (!document.body.dataset.drawn) await new Promise((go) => setTimeout(go, 50)); };
  await drawn();
"""
ONE = {"sources": {"c4": {"corpus": "builtin"}}, "draws": 1, "samples": 8, "recipes": "gptq-w4a16-g64"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> cb.Study:
    """3 sources x 4 draws x 2 recipes x 2 sizes x 2 texts, one failed cell, and names that are HTML."""
    made = plan(description="Does <script>document.title = 'owned'</script> matter?")
    return write_study(
        tmp_path_factory.mktemp("study"), made, model=HOSTILE, failed={5: "the disk is full & <b>no</b> space"}
    )


@pytest.fixture(scope="module")
def page(study: cb.Study) -> str:
    return study.report().read_text(encoding="utf-8")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_the_page_needs_nothing_else_and_escapes_names(page: str) -> None:
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:,)|@import|url\(""", markup.replace("src=x", ""))
    assert "<img" not in markup
    assert "<b>no</b>" not in markup
    assert "Does &lt;script&gt;document.title" in page
    assert page.count("</script>") == 3


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_in_a_real_browser(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    """Every plot is drawn again when another measure is picked, tables sort and filter, nothing is wider than it."""
    probe = f"""{DRAWN}
      const box = (e) => {{ const r = e.getBoundingClientRect(); return [r.width, r.height]; }};
      const titles = '[data-chart=scores] .role-axis-title text';
      const axes = () => [...document.querySelectorAll(titles)].map((e) => e.textContent);
      const ink = (e) => getComputedStyle(e).fill;
      const found = {{
        plots: Object.fromEntries([...document.querySelectorAll('figure')].map((figure) =>
          [figure.dataset.chart, [...figure.querySelectorAll('svg')].map(box)])),
        dots: document.querySelectorAll('[data-chart=scores] .panel:first-child .mark-symbol path').length,
        described: [...document.querySelectorAll('[data-chart=scores] svg')].map((e) =>
          e.closest('[role=graphics-document]').getAttribute('aria-label')),
        before: axes(),
        label: ink(document.querySelector('.role-axis-label text')),
        wide: document.documentElement.scrollWidth > window.innerWidth,
        title: document.title,
        images: document.images.length,
      }};
      const measure = document.querySelector('select[data-field=measure]');
      measure.value = [...measure.options].find((one) => one.text === 'perplexity on wiki').value;
      delete document.body.dataset.drawn;
      measure.dispatchEvent(new Event('change'));
      await drawn();
      found.after = axes();

      const table = document.querySelector('#sources');
      const visible = () => [...table.querySelectorAll('tbody tr')].filter((row) => row.getBoundingClientRect().height);
      const box_ = table.querySelector('input');
      box_.value = 'vocabulary perplexity wiki wanda';
      box_.dispatchEvent(new Event('input'));
      found.filtered = visible().map((row) => row.textContent);
      found.said = table.querySelector('output').textContent;
      box_.value = '';
      box_.dispatchEvent(new Event('input'));
      const heads = [...table.querySelectorAll('th')];
      const mean = heads.find((one) => one.textContent === 'mean');
      const values = () => visible().map((row) => Number(row.children[heads.indexOf(mean)].dataset.value));
      mean.querySelector('button').click();
      found.up = [mean.getAttribute('aria-sort'), values()];
      mean.querySelector('button').click();
      found.down = [mean.getAttribute('aria-sort'), values()];
      heads[0].querySelector('button').click();
      found.names = [mean.hasAttribute('aria-sort'), visible().map((row) => row.children[0].textContent)];
      return found;
    """
    found, console = seen(page, probe, width, tmp_path, dark=dark)
    assert console == []
    assert found.get("error") is None
    assert {name: len(boxes) for name, boxes in found["plots"].items()} == {
        "scores": 2,
        "share": 2,
        "dispersion": 2,
        "sizes": 2,
        "ranks": 2,
        "cost": 1,
    }
    assert all(w > 200 and h > 60 for boxes in found["plots"].values() for w, h in boxes)
    assert found["dots"] == 12  # draws of three sources; the cell that failed is of the smaller size
    for recipe, text in zip(("gptq-w4a16-g64", "wanda-2:4"), found["described"], strict=True):
        assert text.startswith(f"Scores by source. {recipe}. The source explains ")
    assert found["before"] == ["KL on code (nats per token; lower is better)"] * 2
    assert found["after"] == ["perplexity on wiki (lower is better)"] * 2
    assert found["label"] == ("rgb(231, 234, 238)" if dark else "rgb(29, 36, 48)")
    assert not found["wide"]
    assert found["title"] == "Study: made"
    assert found["images"] == 0
    assert len(found["filtered"]) == 2
    assert all("vocabulary" in text and "wanda-2:4" in text for text in found["filtered"])
    assert found["said"] == "2 of 108 rows"
    assert found["up"] == ["ascending", sorted(found["up"][1])]
    assert found["down"] == ["descending", sorted(found["up"][1], reverse=True)]
    assert len(found["up"][1]) == 108
    assert found["names"] == [False, sorted(found["names"][1])]


UNDEFINED = {
    "empty": (plan(), tuple(range(50)), "50 of 50 cells have not run yet: this is preliminary."),
    "one cell": (plan(**ONE, repeat=False), (), "from one draw, which says nothing of its spread"),
    "one draw": (plan(draws=1, repeat=False), (), "no difference of KL can be told from chance"),
    "controls": (plan(recipes=["rtn-w4"]), (), "A recipe that reads no data scores differently on different sets"),
}


def undefined(folder: Path, kind: str) -> str:
    made, waiting, _ = UNDEFINED[kind]
    return write_study(folder, made, waiting=waiting).report().read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", UNDEFINED)
def test_what_is_undefined_has_a_reason(tmp_path: Path, kind: str) -> None:
    text = undefined(tmp_path, kind)
    visible = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text.replace("\xa0", " "), flags=re.S)
    assert UNDEFINED[kind][2] in visible
    assert not re.search(r"\b(NaN|nan|None|null|Infinity|inf)\b", visible)
    assert ('title="one draw has no spread"' in text) == kind.startswith("one")


@needs_browser
def test_a_page_of_one_cell_is_drawn(tmp_path: Path) -> None:
    probe = f"{DRAWN} return {{ plots: document.querySelectorAll('.plot svg').length, text: document.body.innerText }};"
    found, console = seen(undefined(tmp_path, "one cell"), probe, 1280, tmp_path)
    assert console == []
    assert found["plots"] == 2  # its score, and its cost
    assert "Undefined: it needs two sources and two draws that all of them have." in found["text"]


@needs_browser
def test_a_page_without_scores_is_shown(tmp_path: Path) -> None:
    found, console = seen(undefined(tmp_path, "empty"), f"{DRAWN} return [document.body.innerText];", 1280, tmp_path)
    assert console == []
    assert "There are no scores to draw." in found[0]


def test_tables_hold_the_numbers_of_the_analysis(study: cb.Study, tmp_path: Path) -> None:
    study.report(tmp_path)
    found = study.analyse()
    sources = rows(tmp_path / "tables" / "sources.csv")
    expected = [one for setting in found.settings for one in setting.sources]
    assert [(row["source"], int(row["draws"])) for row in sources] == [(o.source, o.description.n) for o in expected]
    for row, one in zip(sources, expected, strict=True):
        said = one.description
        numbers = [float(row[name]) for name in ("mean", "mean low", "mean high", "sd", "least", "most", "range")]
        assert numbers == [
            said.mean, said.interval.low, said.interval.high, said.sd, said.minimum, said.maximum, said.range
        ]  # fmt: skip
    shares = [row for row in rows(tmp_path / "tables" / "components.csv") if row["measure"] == "KL"]
    settings = [one for one in found.settings if one.setting.measure == "kl"]
    assert [float(row["source share %"]) for row in shares] == [100 * one.components.share for one in settings]
    comparisons = [row for row in rows(tmp_path / "tables" / "comparisons.csv") if row["measure"] == "KL"]
    assert [float(row["Holm p"]) for row in comparisons] == [
        one.adjusted_p_value for setting in settings for one in setting.comparisons
    ]
    names = {path.name for path in (tmp_path / "tables").iterdir()}
    assert names == {
        f"{table}.{ending}"
        for table in ("sources", "comparisons", "components", "recipes", "controls", "cells")
        for ending in ("csv", "md", "tex")
    }


def test_the_same_study_gives_the_same_bytes(study: cb.Study, tmp_path: Path) -> None:
    first = study.report(tmp_path / "one").read_bytes()
    assert first == cb.Study(study.folder).report(tmp_path / "two").read_bytes()


def test_a_file_of_someone_else_stays(study: cb.Study, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>mine</p>")
    with pytest.raises(cb.CalibrantError, match=r"report.html: exists and is not a study's page"):
        study.report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_answer_says_what_dominates_and_what_cannot_be_told_apart(page: str) -> None:
    answer = re.search(r'<div class="answer">(.*?)</div>', page, re.S).group(1).replace("\xa0", " ")
    assert re.search(
        r"The source explains \d+ to \d+ % \(median \d+ %\) of the variance of KL over 8 combinations", answer
    )
    assert "Without vocabulary it explains" in answer
    assert "cannot be told apart from" in answer
    assert "1 of 50 cells failed" in page
    assert "With 3 to 4 draws a source only large differences can be seen" in page


def test_tables_escape_what_their_format_reads() -> None:
    values = ("a_b & 50 % {x} #1 $ ~ ^ \\ |", Estimate(0.5, (0.25, 0.75)), Undefined("no draw"))
    table = Table(
        "t", "100 % of_it", "", "", (Column("name"), Column("mean_of", "estimate"), Column("sd", "number")), (values,)
    )
    latex = as_latex(table)
    assert (
        r"a\_b \& 50 \% \{x\} \#1 \$ \textasciitilde{} \textasciicircum{} \textbackslash{} | & 0.5 [0.25, 0.75] & -- \\"
        in latex
    )
    assert r"\caption{100 \% of\_it}" in latex
    assert r"name & mean\_of & sd \\" in latex
    markdown = as_markdown(table).splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in markdown] == [4, 4, 4]
    assert as_csv(table).splitlines()[0] == "name,mean_of,mean_of low,mean_of high,sd"
    assert next(csv.reader([as_csv(table).splitlines()[1]])) == [values[0], "0.5", "0.25", "0.75", ""]
