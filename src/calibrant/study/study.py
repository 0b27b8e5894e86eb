"""The public functions of studies."""

from dataclasses import dataclass
from pathlib import Path

from calibrant.errors import CalibrantError
from calibrant.executors import ExecutorName
from calibrant.progress import NoProgress, Progress
from calibrant.study.cache import DEFAULT_CACHE, Cache
from calibrant.study.estimate import StudyEstimate, estimate_study
from calibrant.study.plan import Plan, load_plan
from calibrant.study.resolve import resolve
from calibrant.study.run import run_cells
from calibrant.study.store import STORE_NAME, Failure
from calibrant.study.workers import LocalWorkers, RayWorkers, Workers


@dataclass(frozen=True)
class StudyRun:
    """What a run of a study did: its folder, the number of its cells, and those that failed."""

    folder: Path
    cells: int
    failures: list[Failure]

    @property
    def store(self) -> Path:
        """The SQLite file of the results."""
        return self.folder / STORE_NAME


def run_study(
    plan: Plan | str | Path,
    *,
    output: str | Path | None = None,
    cache: str | Path = DEFAULT_CACHE,
    executor: ExecutorName = "local",
    workers: int = 1,
    processors: int = 1,
    devices: int = 0,
    progress: Progress | None = None,
) -> StudyRun:
    """Run the cells of a study that have no results yet, and store the results in ``output``/study.sqlite.

    Args:
        plan: a plan, or its YAML file.
        output: the study's folder; by default one with the plan's name beside the YAML file.
        cache: a folder for sets, originals and results, which studies share. On a cluster, all nodes must see it.
        executor: "local" runs cells in ``workers`` processes of this machine, "ray" on a cluster, where each takes
            ``processors`` processors and ``devices`` GPUs.
        progress: receives the progress; None for silence.

    Raises:
        CalibrantError: the plan names something that does not exist or does not fit; nothing has run then.
    """
    listener = progress or NoProgress()
    if workers < 1 or processors < 1 or devices < 0:
        raise CalibrantError("a study needs at least 1 worker, 1 processor a cell, and 0 devices")
    wanted = _loaded(plan)
    if output is None:
        if isinstance(plan, Plan):
            raise CalibrantError("a plan without a file needs `output`, the study's folder")
        output = Path(plan).parent / wanted.name
    store = _cache(cache)
    resolved = resolve(wanted, store, listener)
    estimate_study(resolved, store, workers, listener)
    runner: Workers
    if executor == "local":
        runner = LocalWorkers(store, workers)
    elif executor == "ray":
        runner = RayWorkers(store, processors, devices)
    else:
        raise CalibrantError(f"{executor}: no executor of that name; there are local, ray")
    failures = run_cells(resolved, Path(output), store, runner, listener)
    return StudyRun(Path(output), len(resolved.cells), failures)


def plan_study(
    plan: Plan | str | Path,
    *,
    cache: str | Path = DEFAULT_CACHE,
    workers: int = 1,
    progress: Progress | None = None,
) -> StudyEstimate:
    """Check a study and estimate what it takes; the arguments are those of ``run_study``.

    Raises:
        CalibrantError: see ``run_study``.
    """
    store, listener = _cache(cache), progress or NoProgress()
    return estimate_study(resolve(_loaded(plan), store, listener), store, workers, listener)


def _loaded(plan: Plan | str | Path) -> Plan:
    return plan if isinstance(plan, Plan) else load_plan(plan)


def _cache(folder: str | Path) -> Cache:
    return Cache(Path(folder).expanduser().absolute())
