"""What ``import calibrant as cb`` gives."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import calibrant as cb
from calibrant.methods.method import MethodOptions
from calibrant.methods.registry import METHODS
from tests.conftest import random_set

ROOT = Path(__file__).parents[1]


def stub_names() -> set[str]:
    tree = ast.parse((ROOT / "src" / "calibrant" / "__init__.pyi").read_text(encoding="utf-8"))
    return {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_dir_shows_the_whole_api_and_every_name_loads() -> None:
    assert set(dir(cb)) == set(cb.__all__) == stub_names()
    for name in cb.__all__:
        assert getattr(cb, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cb.no_such_name


def test_every_public_name_is_documented() -> None:
    for name in cb.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(cb, name)), name


def test_every_method_and_transform_can_be_built_in_python() -> None:
    options = {getattr(cb, name) for name in cb.__all__}
    assert {method.options for method in METHODS.values()} <= options


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, calibrant; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_recipe_from_typed_arguments_is_that_of_its_file() -> None:
    built = cb.Recipe(
        name="mine",
        description="d",
        method=cb.Gptq(refine_sweeps=10),
        scheme=cb.Scheme(weights=cb.Weights(bits=4, group_size="auto", range_search="clip")),
        transforms=[cb.Awq(duo=True)],
        drift_correction=0.25,
    )
    assert cb.Recipe.model_validate(built.as_written()) == built
    trained = cb.Recipe(
        name="t", description="d", method=cb.Zsaq(steps=3), scheme=cb.Scheme(weights=cb.Weights(bits=4))
    )
    assert trained.training == cb.Zsaq(steps=3)


def test_a_prepared_run_estimates_and_runs_as_compress_does(llama: Path, tmp_path: Path) -> None:
    data = random_set(llama)
    prepared = cb.prepare(llama, output=tmp_path / "a", recipe="gptq-w4a16-g32", calibration=data, dtype="float32")
    estimate = prepared.estimate()
    assert min(estimate.seconds, estimate.memory_bytes, estimate.disk_bytes) > 0
    assert not prepared.writes_set
    prepared.run()
    cb.compress(llama, output=tmp_path / "b", recipe="gptq-w4a16-g32", calibration=data, dtype="float32")
    for name in ("model.safetensors", "calibrant.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_record_reads_what_it_wrote(llama: Path, tmp_path: Path) -> None:
    for recipe in ("best-w4a16", "wanda-2:4", "gptq-w4a16-budget"):
        folder = tmp_path / recipe.replace(":", "-")
        cb.compress(llama, output=folder, recipe=recipe, calibration=random_set(llama), dtype="float32")
        record = cb.RunRecord.read(folder)
        assert record.recipe.name == recipe
        assert record.format_version == 2
        written = (folder / "calibrant.json").read_text(encoding="utf-8")
        record.write(folder)
        assert (folder / "calibrant.json").read_text(encoding="utf-8") == written
    (folder / "calibrant.json").write_text(written.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(cb.CalibrantError, match="no record that calibrant"):
        cb.RunRecord.read(folder)


def test_a_record_of_another_version_is_not_overlooked(llama: Path, tmp_path: Path) -> None:
    """Its model may be quantized already, stored dense."""
    cb.compress(llama, output=tmp_path / "out", recipe="wanda-2:4", calibration=random_set(llama))
    record = tmp_path / "out" / "calibrant.json"
    record.write_text(record.read_text().replace('"format_version": 2', '"format_version": 0'))
    with pytest.raises(cb.CalibrantError, match="no record that calibrant"):
        cb.prepare(tmp_path / "out", output=tmp_path / "again", recipe="rtn-w8a16")


def test_a_method_that_is_not_registered_is_refused() -> None:
    class Unknown(MethodOptions):
        name: str = "unknown"

    with pytest.raises(ValueError, match="no method 'unknown'; there are rtn"):
        cb.Recipe(name="r", description="d", method=Unknown(), scheme=cb.Scheme(weights=cb.Weights(bits=4)))


@pytest.mark.parametrize(("own", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_wait_without_taking_a_core(own: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    code = "import os, calibrant; print(os.environ['OMP_WAIT_POLICY'])"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == expected
