"""``calibrant study export``."""

from calibrant.cli.console import JsonOption, OutputOption, QuietOption, terminal
from calibrant.cli.study.shared import StudyArgument


def export(
    folder: StudyArgument,
    output: OutputOption,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a study's cells, scores and items as Parquet and CSV.

    Example: calibrant study export studies/tiny -o tables
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        written = [str(path) for path in cb.Study(folder).export(output)]
        screen.result({"files": written}, "\n".join(written))
