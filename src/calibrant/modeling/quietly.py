"""Suppression of the output of other libraries while they load a model."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from transformers.utils import logging


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress progress bars and remarks on standard error, which no single switch turns off; errors still raise."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        logging.set_verbosity(before)
