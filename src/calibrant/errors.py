"""The only exception that users should see."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class CalibrantError(Exception):
    """A problem that the user can fix.

    The message is one sentence: the file, line or parameter, the problem, and the fix. Messages name parameters of the
    Python API in single backticks, for example "`overwrite=True` replaces it", and never options of the command line.
    The command line translates parameters in backticks into its options, prints the message and exits with status 2.
    """
