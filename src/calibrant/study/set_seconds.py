"""What making a calibration set takes, before it is made. The constants are rough and ours."""

from calibrant.calibration.corpus import Corpus
from calibrant.calibration.selection.selecting import WITH_MODEL
from calibrant.pipeline.prepare import PreparedRun
from calibrant.pipeline.writing_cost import writing_seconds
from calibrant.study.plan import GeneratedSource, GivenSource, SelectedSource
from calibrant.study.steps import SetStep

# Starting a set, and reading and tokenizing a byte of text.
_STARTING_SECONDS, _SECONDS_PER_BYTE = 1.0, 0.25e-6
# What compressed text unpacks to, and bytes of text in a token.
_UNPACKED, _BYTES_PER_TOKEN = 3.0, 4.0
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".parquet")
# Attention and norms beside products of matrices.
_BESIDE_PRODUCTS = 1.5


def set_seconds(step: SetStep, prepared: PreparedRun, weights: int, rate: float) -> float:
    """Seconds that the set takes with a model of ``weights`` numbers, at ``rate`` FLOPs a second.

    Texts from the hub and of Python's documentation count nothing: their sizes are not known here.
    """
    source = step.source
    if isinstance(source, GivenSource):
        return 0.0
    text = _bytes(source)
    seconds = _STARTING_SECONDS + text * _SECONDS_PER_BYTE
    if isinstance(source, SelectedSource) and source.strategy in WITH_MODEL:
        tokens = text / _BYTES_PER_TOKEN / step.shards
        seconds += _BESIDE_PRODUCTS * 2.0 * weights * tokens / rate
    if isinstance(source, GeneratedSource) and source.strategy != "vocabulary":
        seconds += writing_seconds(weights, len(prepared.plan.blocks), step.samples, step.length, rate)
    return seconds


def _bytes(source: GeneratedSource | SelectedSource) -> float:
    """Bytes of text that the source reads."""
    locations = source.corpora if isinstance(source, SelectedSource) else filter(None, [source.corpus])
    sizes = [(name, Corpus(name, source.field).size or 0) for name in locations]
    return sum(size * (_UNPACKED if name.endswith(_COMPRESSED) else 1.0) for name, size in sizes)
