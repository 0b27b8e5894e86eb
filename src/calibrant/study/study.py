"""The public functions of studies."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from calibrant.errors import CalibrantError
from calibrant.executors import ExecutorName
from calibrant.progress import NoProgress, Progress
from calibrant.study.cache import Cache
from calibrant.study.estimate import StudyEstimate, check_disk, estimate_study
from calibrant.study.halving import Recommendation
from calibrant.study.plan import StudyPlan, load_study_plan
from calibrant.study.recommend import TEXT_MEASURES, search, searchable
from calibrant.study.resolve import resolve
from calibrant.study.run import finished_cells, run_cells
from calibrant.study.store import Failure
from calibrant.study.workers import LocalWorkers, RayWorkers, Workers
from calibrant.user_cache import STUDIES


@dataclass(frozen=True)
class StudyRun:
    """What a run of a study did: its folder, the number of its cells, and those that failed."""

    folder: Path
    cells: int
    failures: list[Failure]


def run_study(
    plan: StudyPlan | str | Path,
    *,
    output: str | Path | None = None,
    cache: str | Path = STUDIES,
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
    listener, store, wanted = progress or NoProgress(), _cache(cache), _loaded(plan)
    folder = _folder(plan, wanted.name, output)
    resolved = resolve(wanted, store, listener)
    check_disk(resolved, finished_cells(resolved, folder), store, workers)
    with closing(_workers(store, executor, workers, processors, devices)) as runner:
        failures = run_cells(resolved, folder, store, runner, listener)
    return StudyRun(folder, len(resolved.cells), failures)


def recommend_source(
    plan: StudyPlan | str | Path,
    *,
    measure: str = "kl",
    on: str | None = None,
    budget: int = 60,
    smallest_difference: float = 0.0,
    output: str | Path | None = None,
    cache: str | Path = STUDIES,
    executor: ExecutorName = "local",
    workers: int = 1,
    processors: int = 1,
    devices: int = 0,
    progress: Progress | None = None,
) -> Recommendation:
    """Say which of a plan's sources to take, after as few cells as that needs
    (docs/studies.md "Which source to take"). Arguments that are not explained here are those of ``run_study``.

    Args:
        plan: a plan of one model, recipe and size, or its YAML file. Its draws and repeats do not count: sources get
            draws, at most ``most_draws`` of the plan, until one is better or ``budget`` ends.
        measure: what decides, such as "kl", "perplexity" or "acc".
        on: the text or task it is measured on; by default the plan's first.
        budget: most cells to run.
        smallest_difference: differences up to this do not matter.
        output: folder of the cells' results; by default one with the plan's name and ".recommend" beside the YAML file.

    Raises:
        CalibrantError: see ``run_study``; or the plan has several models, recipes or sizes.
    """
    listener, store, wanted = progress or NoProgress(), _cache(cache), searchable(_loaded(plan))
    folder = _folder(plan, f"{wanted.name}.recommend", output)
    tasks = wanted.tasks.names if wanted.tasks else ()
    where = on if on is not None else [*(wanted.texts if measure in TEXT_MEASURES else ()), *tasks, *wanted.texts][0]
    resolved = resolve(wanted, store, listener)
    with closing(_workers(store, executor, workers, processors, devices)) as runner:
        return search(resolved, measure, where, budget, smallest_difference, folder, store, runner, listener)


def plan_study(
    plan: StudyPlan | str | Path,
    *,
    output: str | Path | None = None,
    cache: str | Path = STUDIES,
    workers: int = 1,
    progress: Progress | None = None,
) -> StudyEstimate:
    """Check a study and estimate what is left of it; the arguments are those of ``run_study``.

    A plan without a file needs no ``output``; what is in the cache is done then.

    Raises:
        CalibrantError: see ``run_study``.
    """
    store, listener, wanted = _cache(cache), progress or NoProgress(), _loaded(plan)
    resolved = resolve(wanted, store, listener)
    without_folder = isinstance(plan, StudyPlan) and output is None
    finished = set() if without_folder else finished_cells(resolved, _folder(plan, wanted.name, output))
    return estimate_study(resolved, finished, store, workers, listener)


def _loaded(plan: StudyPlan | str | Path) -> StudyPlan:
    if not isinstance(plan, StudyPlan | str | Path):
        raise CalibrantError(f"a plan is a `StudyPlan` or the path of its YAML file, not a {type(plan).__name__}")
    return plan if isinstance(plan, StudyPlan) else load_study_plan(plan)


def _cache(folder: str | Path) -> Cache:
    place = Path(folder).expanduser().absolute()
    if place.exists() and not place.is_dir():
        raise CalibrantError(f"{place}: is no folder; name one with `cache`")
    return Cache(place)


def _folder(plan: StudyPlan | str | Path, name: str, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if isinstance(plan, StudyPlan):
        raise CalibrantError("a plan without a file needs `output`, the study's folder")
    return Path(plan).parent / name


def _workers(cache: Cache, executor: str, count: int, processors: int, devices: int) -> Workers:
    if count < 1 or processors < 1 or devices < 0:
        raise CalibrantError("a study needs at least 1 worker, 1 processor a cell, and 0 devices")
    if executor == "local":
        return LocalWorkers(cache, count)
    if executor == "ray":
        return RayWorkers(cache, processors, devices)
    raise CalibrantError(f"{executor}: no executor of that name; there are local, ray")
