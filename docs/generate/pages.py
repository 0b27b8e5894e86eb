"""Pages of the site that are made from the code: command line, Python API, recipes, file schemas, notebooks."""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import nbformat
import typer
from nbconvert import MarkdownExporter
from pydantic import BaseModel, TypeAdapter
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

import calibrant as cb
from calibrant.cli.main import app
from calibrant.pipeline.record import RunRecord, RunReport

ROOT = Path(__file__).parents[2]
# Public names by the heading under which the page of the Python API shows them.
SECTIONS = {
    "Compressing": ("api", "pipeline.prepare", "pipeline.write_gguf", "formats.imatrix"),
    "Calibration data": ("calibration",),
    "Evaluating and reporting": (
        "evaluation",
        "pipeline.comparison",
        "pipeline.run_report",
        "pipeline.proof",
        "report",
    ),
    "Studies": ("study",),
    "Recipes": ("recipes",),
    "Methods": ("methods",),
    "Records, progress and errors": ("pipeline", "engine", "progress", "errors", "version"),
}
SCHEMAS: dict[str, tuple[str, Any]] = {
    "Manifest of a calibration set": (
        "`manifest.json` in the folder of a set: where every row came from.",
        cb.Manifest,
    ),
    "Record of a run": ("`calibrant.json` in an output: what determined the result, and the result.", RunRecord),
    "Report of a run": ("`report.json` in an output: what differs between two equal runs.", RunReport),
    "Plan of a study": ("A YAML file; [the keys explained](studies.md#the-plan).", cb.StudyPlan),
    "Recipe": ("A YAML file; [the keys explained](recipes.md).", cb.Recipe),
}


def write(name: str, *parts: str) -> None:
    """A page of the site."""
    with mkdocs_gen_files.open(name, "w") as page:
        page.write("\n\n".join(parts) + "\n")


def cell(text: str) -> str:
    """``text`` as a cell of a table."""
    return " ".join(text.split()).replace("|", r"\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def commands(command: TyperCommand | TyperGroup, name: str) -> Iterator[str]:
    """The sections of ``command`` and of those below it."""
    if isinstance(command, TyperGroup):
        for part, found in command.commands.items():
            yield from commands(found, f"{name} {part}")
        return
    yield f"## {name}"
    described, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
    yield described.strip()
    yield f"    {' '.join(example.split())}"
    arguments = [one for one in command.params if isinstance(one, TyperArgument)]
    options = [one for one in command.params if isinstance(one, TyperOption) and not one.hidden and one.name != "help"]
    rows = [[f"`{one.name}`", cell(one.help or ""), "" if one.required else "optional"] for one in arguments]
    for panel in dict.fromkeys([None, *(one.rich_help_panel for one in options)]):
        rows += [
            ["`" + "`, `".join(one.opts) + "`", cell(one.help or ""), default(one)]
            for one in options
            if one.rich_help_panel == panel
        ]
        if panel:
            yield f"**{panel}**"
        yield table(["option" if panel else "argument or option", "what it says", "default"], rows)
        rows = []


def default(option: TyperOption) -> str:
    """The default of ``option``, as its help shows it."""
    if option.required:
        return "required"
    if option.is_flag or option.default is None or option.show_default is False:
        return ""
    if isinstance(option.show_default, str):
        return option.show_default
    value = str(option.default).replace(str(Path.home()), "~")
    return f"`{value}`" if value not in ("", "[]", "()") else ""


def public_names() -> dict[str, str]:
    """Where each public name is defined, by name, as ``__init__.pyi`` says."""
    tree = ast.parse((ROOT / "src/calibrant/__init__.pyi").read_text())
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return {one.name: f"calibrant.{node.module}.{one.name}" for node in imports for one in node.names}


def sections(names: dict[str, str]) -> Iterator[str]:
    """The names of each section, functions first."""
    left = dict(names)
    for heading, modules in SECTIONS.items():
        starts = tuple(f"calibrant.{module}." for module in modules)
        chosen = [name for name, path in left.items() if path.startswith(starts)]
        chosen.sort(key=lambda name: (name[0].isupper(), name.lower()))
        yield f"## {heading}"
        for name in chosen:
            yield f"::: {left.pop(name)}"
    assert not left, f"no section has {sorted(left)}"


def kind(field: dict[str, Any]) -> str:
    """The type of a field of a JSON schema, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind(one) for one in field["anyOf"]))
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[1].lstrip("_")
    if "const" in field:
        return json.dumps(field["const"])
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if field.get("type") == "array" and "items" in field:
        return f"list of {kind(field['items'])}"
    additional = field.get("additionalProperties")
    if field.get("type") == "object" and isinstance(additional, dict):
        return f"object of {kind(additional)}"
    if "oneOf" in field:
        return " or ".join(kind(one) for one in field["oneOf"])
    return str(field.get("type", "anything"))


def schema(model: Any) -> Iterator[str]:
    """The fields of a file, and of the objects in it."""
    made = model.model_json_schema() if issubclass(model, BaseModel) else TypeAdapter(model).json_schema()
    for name, one in {"": made, **made.get("$defs", {})}.items():
        if "properties" not in one:
            continue
        if name:
            yield f"**{name.lstrip('_')}**"
        required = one.get("required", [])
        rows = [
            [f"`{key}`", cell(kind(field)), "" if key in required else f"`{json.dumps(field.get('default'))}`"]
            for key, field in one["properties"].items()
        ]
        yield table(["field", "type", "if it is missing"], rows)


def notebook(path: Path) -> str:
    """A notebook as Markdown, with the outputs that it was saved with."""
    body, _ = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
    return str(body)


write(
    "command-line.md",
    "# Command line",
    "Every command prints this with `--help`. `calibrant --install-completion` installs completion for your shell. "
    "A usage error, or input that cannot be read, ends with status 2 and one sentence; Ctrl-C ends with status 130.",
    *commands(typer.main.get_command(app), "calibrant"),
)
write(
    "api.md",
    "# Python API",
    "`import calibrant as cb`, and `dir(cb)` lists every name below. The command line calls these functions; its "
    "options are their parameters. Input that cannot be used raises `CalibrantError`, with one sentence.",
    *sections(public_names()),
)
write(
    "builtin-recipes.md",
    "# Built-in recipes",
    "`calibrant recipes NAME > mine.yaml` writes a recipe to change; [recipes](recipes.md) explains the keys. Most of "
    "them are measured in [measurements](measurements.md#every-method).",
    table(
        ["recipe", "needs data", "what it does"],
        [
            [f"`{name}`", "yes" if one.needs_data else "no", cell(one.description)]
            for name, one in cb.builtin_recipes().items()
        ],
    ),
)
write(
    "schemas.md",
    "# File schemas",
    "Files that Calibrant writes are read back through these models, so a file with an unknown field or another type "
    "is refused with a sentence. `cb.Manifest.model_json_schema()` gives the first as JSON schema.",
    *(part for heading, (where, model) in SCHEMAS.items() for part in (f"## {heading}", where, *schema(model))),
)
for path in sorted((ROOT / "examples").glob("*.ipynb")):
    write(f"examples/{path.stem}.md", notebook(path))
