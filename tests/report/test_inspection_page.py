import re
import sys
from pathlib import Path

import pytest

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.report.inspection_page import inspection_page


@pytest.mark.parametrize("library", ["altair", "vl_convert"])
def test_the_page_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CalibrantError, match=r"needs the extra: pip install 'calibrant\[report\]'"):
        inspection_page([], [])


def test_a_set_without_a_tokenizer_is_read_with_the_model_that_is_named(llama: Path, tmp_path: Path) -> None:
    cb.CalibrationSet.from_tokens([[5, 6, 7, 8]]).save(tmp_path / "set")
    found = cb.inspect_sets([tmp_path / "set"], model=llama)
    assert found.sets[0].statistics.numbers["rows"] == 1


@pytest.mark.parametrize("beyond", [128, 4000, 2**31 - 1])
def test_ids_beyond_the_vocabulary_are_refused_before_the_model_runs(llama: Path, tmp_path: Path, beyond: int) -> None:
    cb.CalibrationSet.from_tokens([[5, 6, 7, beyond]]).save(tmp_path / "set")
    assert cb.inspect_sets([tmp_path / "set"], model=llama).sets
    with pytest.raises(cb.CalibrantError, match=r"set: has token ids outside .* vocabulary of 128"):
        cb.inspect_sets([tmp_path / "set"], model=llama, perplexity=True)


def test_the_page_begins_with_what_the_numbers_say(llama: Path, tmp_path: Path) -> None:
    sets = {"few": [[5, 6, 7, 8]] * 2, "many": [[9, 10, 11, 12], [13, 14, 15, 5]]}
    for name, ids in sets.items():
        cb.CalibrationSet.from_tokens(ids).save(tmp_path / name)
    page = cb.inspect_sets([tmp_path / name for name in sets], model=llama).page()
    answer = page[page.index('class="answer"') : page.index("<nav")]
    assert "many covers the largest share of the vocabulary" in answer
    assert "few the smallest" in answer
    assert "No two sets share a row." in answer
    alone = cb.inspect_sets([tmp_path / "few"], model=llama).page()
    assert "2 rows with 8 counted tokens cover" in alone
    assert not re.search(r">\s*(div|zipf|distinct)_\w+", page), "names of fields are no labels"
