"""``calibrant recipes``."""

from typing import Annotated

import typer

from calibrant.cli.console import JsonOption


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print in full, ready to copy.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the built-in recipes, or print one.

    Example: calibrant recipes wanda-2:4
    """
    import json

    import yaml
    from rich.console import Console
    from rich.table import Table

    import calibrant as cb

    if name is not None:
        shown = cb.load_recipe(name).as_written(exclude_none=True)
        print(
            json.dumps(shown, indent=2) if as_json else yaml.safe_dump(shown, sort_keys=False),
            end="\n" if as_json else "",
        )
        return
    found = cb.builtin_recipes()
    if as_json:
        print(json.dumps({key: recipe.as_written(exclude_none=True) for key, recipe in found.items()}, indent=2))
        return
    table = Table("recipe", "needs data", "what it does")
    for key, recipe in found.items():
        table.add_row(key, "yes" if recipe.needs_data else "no", recipe.description)
    Console().print(table)
