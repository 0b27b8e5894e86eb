"""The one exception a user is meant to see."""


def first_line(error: BaseException) -> str:
    """The first line of what a library said, or the name of its error where it said nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class CalibrantError(Exception):
    """A problem the user can mend.

    The message is one sentence that names the file, line or option, what was expected and what to do.
    The command line prints it and exits with status 2.
    """
