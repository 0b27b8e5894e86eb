"""The one exception a user is meant to see."""


class CalibrantError(Exception):
    """A problem the user can mend.

    The message is one sentence that names the file, line or option, what was expected and what to do.
    The command line prints it and exits with status 2.
    """
