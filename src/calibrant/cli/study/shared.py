"""Arguments and options that the study commands share."""

from pathlib import Path
from typing import Annotated

import typer

PlanArgument = Annotated[Path, typer.Argument(help="YAML file of the study.", show_default=False)]
StudyArgument = Annotated[Path, typer.Argument(help="Folder of the study.", show_default=False)]
CacheOption = Annotated[
    Path, typer.Option("--cache", help="Folder for sets, originals and results, which studies share.")
]
PairedOption = Annotated[
    bool, typer.Option("--paired", help="Compare sources draw by draw: their draws share documents.")
]
FolderOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the study; by default the study's name, beside its file."),
]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="local (processes of this machine) or ray (a Ray cluster).")
]
WorkersOption = Annotated[
    int, typer.Option("--workers", "-w", min=1, help="Processes that run cells, with --executor local.")
]
ProcessorsOption = Annotated[
    int, typer.Option("--processors", min=1, help="Processors of each cell, with --executor ray.")
]
DevicesOption = Annotated[int, typer.Option("--devices", min=0, help="GPUs of each cell, with --executor ray.")]
