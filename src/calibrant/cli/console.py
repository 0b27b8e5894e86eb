"""Options, progress bars, tables and JSON output shared by all commands."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibrant.progress import NoProgress, Progress, Task
from calibrant.report.tables import size_text

if TYPE_CHECKING:
    from rich.console import Console

ModelArgument = Annotated[
    str, typer.Argument(help="Model folder with safetensors files, hub:owner/name, or demo.", show_default=False)
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]
SamplesOption = Annotated[int, typer.Option("--samples", "-n", help="Number of rows in the calibration set.")]
LengthOption = Annotated[int, typer.Option("--length", "-l", help="Tokens per row or window.")]
ModelLengthOption = Annotated[
    int | None,
    typer.Option("--length", "-l", help="Tokens per row; by default 512, or the model's context if it is shorter."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
DrawOption = Annotated[
    int, typer.Option("--draw", help="Number of the set among the independent sets of one seed: 0, 1, ...")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
DequantizeOption = Annotated[
    bool,
    typer.Option("--dequantize", help="Decode a quantized model (FP8, MXFP4, GPTQ, ...) as its weights are read."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Dtype of forward passes: auto (bfloat16 if the processor supports it in hardware), bfloat16 or float32. "
        "Statistics and solvers always use float32.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
AgainstOption = Annotated[
    str | None, typer.Option("--against", help="Original model; the divergence from it is measured.")
]
WikitextOption = Annotated[
    str | None,
    typer.Option("--wikitext", help="WikiText's raw file: perplexity as papers report it, windows of 2,048 tokens."),
]
TasksOption = Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, as in piqa,arc_easy.")]
TaskDataOption = Annotated[
    str | None, typer.Option("--data", help="Folder of the tasks' files, or hub: for each task's hub data set.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use only the first windows of texts and items of tasks.")
]
TaskLimitOption = Annotated[
    int | None, typer.Option("--task-limit", min=1, help="Items of each task, where --limit is for windows only.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]
FieldOption = Annotated[
    str,
    typer.Option(
        "--field",
        help="Field or column of the text (JSON Lines, Parquet); several, separated by commas, are joined.",
    ),
]


@dataclass
class Terminal:
    """Output of a command: progress and notes on standard error, results on standard output."""

    progress: Progress
    quiet: bool
    json: bool

    def note(self, text: str) -> None:
        """Show one line."""
        self.progress.note(text)

    def result(self, value: dict[str, Any], *renderables: Any) -> None:
        """Print the result: ``value`` as JSON, or the tables and lines ``renderables``."""
        if self.json:
            print(json.dumps(value, indent=2, default=str, allow_nan=False))
        elif not self.quiet:
            from rich.console import Console

            console = Console(markup=False)
            for renderable in renderables:
                console.print(renderable, soft_wrap=isinstance(renderable, str))  # paths stay in one piece


@contextmanager
def terminal(quiet: bool, as_json: bool) -> Iterator[Terminal]:
    """Progress bars if standard error is a terminal, plain lines otherwise, nothing with ``--quiet``."""
    quiet_libraries()
    if quiet:
        yield Terminal(NoProgress(), quiet, as_json)
        return
    from rich.console import Console

    console = Console(stderr=True)
    yield Terminal(_Bars(console) if console.is_terminal else _Lines(), quiet, as_json)


def quiet_libraries() -> None:
    """Turn off the warnings and progress bars of transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# Tasks that end sooner leave no trace on the screen.
_SHORT_SECONDS = 1.0


class _Bars:
    def __init__(self, console: "Console") -> None:
        self._console = console

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Task]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        done = [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
        columns = [TextColumn("{task.description:<20}"), BarColumn(), *done, TimeElapsedColumn()]
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self._console) as bars:
            bar = bars.add_task(label, total=total)

            class Handle:
                def advance(self, steps: int = 1) -> None:
                    bars.advance(bar, steps)

            yield Handle()
            bars.update(bar, visible=(bars.tasks[0].elapsed or 0.0) >= _SHORT_SECONDS)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


class _Lines:
    """Progress for logs: a line per tenth of a task, none for short ones or if the number of steps is unknown."""

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Task]:
        import time

        begin = time.perf_counter()

        class Handle:
            done = 0

            def advance(self, steps: int = 1) -> None:
                before, self.done = self.done, self.done + steps
                seconds = time.perf_counter() - begin
                if total and before * 10 // total != self.done * 10 // total and seconds >= _SHORT_SECONDS:
                    done = _done_text(self.done, total, unit)
                    print(f"{label}: {done}, {seconds:.0f} s", file=sys.stderr, flush=True)

        yield Handle()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _done_text(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{size_text(done)} of {size_text(total)}"
    return f"{done:,} of {total:,} {unit}".rstrip()


def task_names(tasks: str | None) -> list[str]:
    """The names in the value of ``--tasks``."""
    return [] if tasks is None else [name.strip() for name in tasks.split(",")]
