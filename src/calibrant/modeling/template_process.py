"""A process that renders chat templates, which strangers write, within limits of time, memory and size.

Run as a script it is that process: every line of its input is a request, every line of its output the answer.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

# A template takes milliseconds for a conversation.
_SECONDS = 3
_MEMORY_BYTES = 512 << 20
_LONGEST = 16_000_000
# Templates may print today's date; a set needs the same one on every day. Llama's templates have this one for programs
# that know no date.
DATE = "2024-07-26"


class RefusedError(Exception):
    """The template does not take a conversation; the text says why."""


class LimitError(Exception):
    """The template takes more time or memory than it may, or writes too much; the text says which."""


class TemplateProcess:
    """The process; it starts with the first request, and again if a request has ended it.

    A request may take ``seconds`` of processor time.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def render(self, request: dict[str, Any]) -> str:
        """The text for a request, the arguments of transformers' ``render_jinja_template`` for one conversation.

        Raises:
            RefusedError: the template raises an error.
            LimitError: the template exceeds a limit.
        """
        line = json.dumps(request).encode() + b"\n"
        with self._one_at_a_time:
            answer = self._answer(line)
        if "limit" in answer:
            raise LimitError(answer["limit"])
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return str(answer["text"])

    def _answer(self, line: bytes) -> dict[str, Any]:
        if self._process is None:
            self._process = self._started()
            atexit.register(self._stop)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            status = process.wait()
            self._stop()
            over = f"it takes more than {self._seconds:g} seconds or {_MEMORY_BYTES >> 20} MiB"
            return {"limit": over if status < 0 else f"the process that renders it ended with status {status}"}
        found: dict[str, Any] = json.loads(answer)
        return found

    def _started(self) -> "subprocess.Popen[bytes]":
        # Threads of linear algebra would only reserve memory.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__)), str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # an interrupt at the terminal is for this process alone
        )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
            atexit.unregister(self._stop)


@cache
def template_process() -> TemplateProcess:
    """The one process of this program."""
    return TemplateProcess()


def _serve(seconds: float) -> None:
    import random
    import signal
    from datetime import datetime

    import transformers.utils.chat_template_utils as templates

    class FixedDate(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "FixedDate":
            return cls.fromisoformat(DATE)

    templates.datetime = FixedDate  # type: ignore[attr-defined]  # what its function strftime_now asks
    _limit_memory()
    for line in sys.stdin.buffer:
        random.seed(0)  # Jinja's filter "random" and its function lipsum draw from it
        # The signal ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _rendered(templates.render_jinja_template, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _rendered(render: Any, request: dict[str, Any]) -> dict[str, str]:
    try:
        text = str(render(**request)[0][0])
        text.encode()  # half of a surrogate pair is no text
    except MemoryError:
        return {"limit": f"it takes more than {_MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # templates raise errors of any class
        return {"refused": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return {"text": text} if len(text) <= _LONGEST else {"limit": f"it writes more than {_LONGEST:,} characters"}


def _limit_memory() -> None:
    import resource

    used = Path("/proc/self/statm")
    if used.exists():
        limit = int(used.read_text().split()[0]) * resource.getpagesize() + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
