"""Recipe files of strangers: every one is a recipe or is refused in one sentence, in bounded time."""

from pathlib import Path

import pytest

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.recipes.expressions import MATCHING_SECONDS

PLAIN = "name: n\ndescription: d\nmethod: {name: rtn}\nscheme: {weights: {bits: 4}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_plain_recipe_is_read(tmp_path: Path) -> None:
    assert cb.load_recipe(write(tmp_path, PLAIN)).name == "n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAIN + "k: !!timestamp 99999-01-01", "a tag"),
        (PLAIN + "k: !!python/name:os.system x", "a tag"),
        (PLAIN + "k: !!binary {a: b}", "a tag"),
        (PLAIN + "k: !!int x", "a tag"),
        (PLAIN + "k: 2001-99-99", "month must be in"),
        (PLAIN.replace("name: n", "name: 2001-01-01"), "put it in quotes"),
        (PLAIN + "k: 0b_", "invalid literal"),
        (PLAIN.replace("bits: 4", "bits: 0x" + "f" * 5000), "an integer beyond 64 bits"),
        (PLAIN.replace("bits: 4", "bits: " + "9" * 5000), "limit"),
        (PLAIN.replace("bits: 4", "bits: -9223372036854775809"), "an integer beyond 64 bits"),
        (PLAIN.replace("name: n", 'name: "\\ud800"'), "no character"),
        (PLAIN.replace("description: d", 'description: "a\\udfffb"'), "no character"),
        (PLAIN + 'ignore: ["\\udc00"]', "no character"),
        (PLAIN + '"\\ud800": 1', "no character"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "an alias"),
        ("&a [*a]", "an alias"),
        ("a: &a {k: 1}\nb: {<<: *a}", "an alias"),
        ("[" * 5000, "nested deeper"),
        ("{a: " * 30 + "1" + "}" * 30, "nested deeper"),
        ("- " * 100 + "x", "nested deeper"),
        (PLAIN + "1: 2", "not a string"),
        (PLAIN + "# " + "x" * 70_000, "more than 32768 bytes"),
        (PLAIN + f"transforms: [{'{name: awq}, ' * 11}]", "at most 10"),
        (PLAIN + f"ignore: [{'q, ' * 101}]", "at most 100"),
        (PLAIN + "transforms: [{name: awq, steps: 1000000000000}]", "less than or equal to 1000"),
    ],
)
def test_files_that_are_no_recipes_are_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CalibrantError, match=said) as refused:
        cb.load_recipe(path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    message.encode("utf-8")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("(" * 450 + ")" * 450, "nested too deep"),
        ("a" * 1001, "at most 1000"),
        ("(?:(?:a{9999}){9999}){9999}", "counts repetitions"),
        ("(?:a{,200}){300}", "counts repetitions"),
        ("a{99999999999}", "repetition number is too large"),
        ("(?R)", "unknown extension"),
        ("(", "not a regular expression"),
    ],
)
def test_expressions_that_cannot_be_compiled_are_refused(tmp_path: Path, expression: str, said: str) -> None:
    with pytest.raises(CalibrantError, match=said):
        cb.load_recipe(write(tmp_path, PLAIN + f"ignore: ['{expression}']"))


@pytest.mark.parametrize(
    "expression", ["^(([a-z._0-9])+)+$!", "(([a-z._0-9])+)+!", "^(.|[a-z])+$!", "^((.*)*)*$!", "(.+.+)+!"]
)
def test_expressions_that_backtrack_for_ever_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expression: str
) -> None:
    monkeypatch.setattr("calibrant.recipes.expressions.MATCHING_SECONDS", MATCHING_SECONDS / 20)
    recipe = write(tmp_path, PLAIN + f"ignore: ['{expression}', 'lm_head']")
    with pytest.raises(CalibrantError) as refused:
        cb.prepare(llama, recipe=recipe, output=tmp_path / "out")
    message = str(refused.value)
    # An expression may also end in time without a match, as some matchers see that "!" is in no name.
    assert "takes longer" in message or "is in no module's name" in message
    assert expression in message


@pytest.mark.parametrize(
    "expression", [r"^(.+)(.+)(.+)(.+)(.+)(.+)(.+)\1\2\3$", r"(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)\1\2\3\4\5\6z?[!?]"]
)
def test_matching_ends_after_its_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expression: str
) -> None:
    monkeypatch.setattr("calibrant.recipes.expressions.MATCHING_SECONDS", MATCHING_SECONDS / 20)
    recipe = write(tmp_path, PLAIN + f"ignore: ['{expression}']")
    with pytest.raises(CalibrantError, match=f"{recipe}: ignore: .* takes longer than"):
        cb.prepare(llama, recipe=recipe, output=tmp_path / "out")
