"""What runs in a worker's process."""

import contextlib
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path


def work(connection: Connection, cache: Path, threads: int) -> None:
    """Run steps until the other end of the connection is closed, also by the death of its process."""
    # The terminal sends Ctrl-C to all processes; the one that was asked to run the study ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process(threads)
    from calibrant.study.workers import run_step

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, step = connection.recv()
            connection.send(run_step(number, step, cache))


def prepare_process(threads: int) -> None:
    """Let torch compute with ``threads`` threads, and transformers write nothing."""
    import torch
    import transformers
    from tqdm import tqdm

    # Its own lock is a semaphore of all processes, which outlives a worker that is killed.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
