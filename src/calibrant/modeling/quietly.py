"""Other libraries kept quiet while they load a model."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bars and remarks of the libraries below, which have no one switch for them; errors are raised."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        yield
