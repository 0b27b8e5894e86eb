"""The page of one compressed model, from what its folder holds."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from calibrant.calibration.text_statistics import NUMBER_LABELS
from calibrant.engine.block_solver import LayerReport
from calibrant.errors import CalibrantError
from calibrant.evaluation.samples import PROMPTS, continuations
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.output_folder import whole_file
from calibrant.pipeline.output import Output, mean_error, place, scheme_text
from calibrant.pipeline.quality import quality_table
from calibrant.progress import NoProgress, Progress
from calibrant.report.inspection import inspect_sets, set_facts
from calibrant.report.page import is_replaceable
from calibrant.report.run_page import PAGE_MARK, HeatMap, RunPage, Sample, ShownSet, run_page
from calibrant.report.tables import Column, Table, Undefined, Value, number_text, size_text, value_text

_ROWS, _CHARACTERS = 3, 2000
_MEASURES = {
    "hessian": "outputs on the calibration data",
    "diagonal": "weights by the magnitude of their inputs",
    "weights": "weights",
}


def write_run_report(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    against: str | Path | None = None,
    prompts: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Path:
    """Write a page about a compressed model, one file that works offline, and return its path.

    Args:
        folder: the output of ``compress``.
        output: the file to write; None is ``report.html`` in the folder. An earlier page is replaced.
        against: the original: the page shows what both models write after the ``prompts``. None loads no model.
        prompts: beginnings of texts; empty for four of ours.
        device: "cpu" or "cuda".
        dtype: what models compute in: "bfloat16", "float32" or "auto".
        progress: receives progress; None for silence.

    Raises:
        CalibrantError: the folder is no output, a file in it cannot be read, the models cannot be compared, or the page
            cannot be written or would replace another file.
    """
    found = Output.read(folder)
    target = found.folder / "report.html" if output is None else Path(output)
    if not is_replaceable(target, PAGE_MARK):
        raise CalibrantError(f"{target}: exists and is no page of a compressed model; choose another file")
    if prompts and against is None:
        raise CalibrantError("`prompts` are continued by both models: name the original with `against`")
    samples = []
    if against is not None:
        samples = _samples(found, against, prompts or PROMPTS, device, dtype, progress or NoProgress())
    page = run_page(page_values(found, samples))
    with whole_file(target) as beside:
        beside.write_text(page, encoding="utf-8")
    return target


def page_values(found: Output, samples: list[Sample]) -> RunPage:
    """What the page of an output says."""
    record = found.record
    quality = [] if found.evaluation is None else [quality_table({found.name: found.evaluation})]
    layers = [_layers(found.layers), _fallbacks(found.report.fallbacks)] if found.layers else []
    return RunPage(
        name=found.name,
        summary=_summary(found),
        warnings=_warnings(found),
        facts=_facts(found),
        errors=heat_map(found.layers) if found.layers else None,
        measures=[_MEASURES[name] for name in dict.fromkeys(layer.measure for layer in found.layers)],
        seconds=found.report.seconds,
        calibration=_calibration(found),
        samples=samples,
        notes=record.notes,
        tables=[*quality, *layers],
        recipe=yaml.safe_dump(record.recipe.as_written(exclude_none=True), sort_keys=False, allow_unicode=True),
        versions={"calibrant": record.calibrant_version, **record.libraries},
    )


def heat_map(layers: Sequence[LayerReport]) -> HeatMap:
    """Mean errors by block and kind, both in the model's order."""
    cells: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        cells.setdefault(place(layer.name), []).append(layer)
    blocks, kinds = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    values = [
        [mean_error(cells[block, kind]) if (block, kind) in cells else None for kind in kinds] for block in blocks
    ]
    return HeatMap(_short(blocks), _short(kinds), values)


def _short(names: list[str]) -> list[str]:
    """The last part of every name where that tells them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(names) else names


def _summary(found: Output) -> list[str]:
    record, report = found.record, found.report
    said = [
        f"{record.model['name']} compressed by {record.recipe.name}: {record.share:.1%} of the blocks' weights in "
        f"{sum(report.seconds.values()):.0f} seconds, {report.tensors_verified:,} tensors read back and equal to what "
        "was solved."
    ]
    if found.layers:
        worst = max(found.layers, key=lambda layer: layer.relative_error)
        said.append(
            f"The mean relative error of {len(found.layers)} layers is {number_text(mean_error(found.layers))}, the "
            f"largest {number_text(worst.relative_error)}, of {worst.name}."
        )
    if found.evaluation is not None and found.evaluation.divergence is not None:
        said.append(f"The mean KL divergence from the original is {number_text(found.evaluation.divergence.kl_mean)}.")
    return said


def _warnings(found: Output) -> list[str]:
    count = len(found.report.fallbacks)
    return [f"{count} of {len(found.layers)} layers fell back to another method: see Fallbacks."] if count else []


def _facts(found: Output) -> dict[str, str]:
    record, report = found.record, found.report
    bits = found.stored_bits
    return {
        "method": record.recipe.method.name,
        "scheme": scheme_text(record.recipe.scheme),
        "stored as": record.format,
        "bits per weight on disk": "not stored layer by layer" if bits is None else f"{bits:.2f}",
        "size": f"{size_text(report.bytes_before)} before, {size_text(report.bytes_after)} after",
        "peak memory": size_text(report.peak_memory_bytes),
        "computed in": f"{record.settings.compute_dtype} on {record.settings.device}",
        "order": record.settings.order,
    }


def _calibration(found: Output) -> ShownSet | None:
    """The set as the record and the folder have it; rows need the folder's copy and its tokenizer."""
    manifest = found.record.calibration
    if manifest is None:
        return None
    facts = {**set_facts(manifest), "tokenizer": manifest.tokenizer_sha256}
    try:
        (shown,) = inspect_sets([found.folder / "calibration"], model=found.folder).sets
    except CalibrantError as error:
        return ShownSet(facts, {}, [], f"Rows are not shown: {error}")
    numbers = shown.statistics.numbers
    rows = [text[:_CHARACTERS] for text in shown.texts[:_ROWS]]
    return ShownSet(facts, {label: _number_text(numbers[name]) for name, label in NUMBER_LABELS.items()}, rows)


def _number_text(number: float | None) -> str:
    if number is None:
        return value_text(Undefined("no value"))
    return value_text(int(number) if number == int(number) else number)


def _layers(layers: Sequence[LayerReport]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for layer in layers:
        zeros: Value = layer.zeros / layer.elements if layer.zeros else Undefined("not pruned")
        bits: Value = Undefined("not quantized") if layer.bits is None else layer.bits
        record = layer.record
        raised = "raised" if record.damping_raised else ""
        counts = (layer.elements, layer.tokens, bits, zeros, record.dead_columns, record.rows_rounded, record.outliers)
        rows.append((layer.name, place(layer.name)[1], layer.relative_error, layer.measure, *counts, raised))
    return Table(
        "layers",
        "Layers",
        "Every layer: relative error and what it is measured on, weights, counted tokens that reached it, bits, share "
        "of zeros, dead columns (inputs that were always zero), rows rounded to nearest, outliers kept, damping.",
        "No layer was solved one by one.",
        (
            Column("layer"),
            Column("kind"),
            Column("relative error", "number"),
            Column("measured on", role="key"),
            Column("weights", "number"),
            Column("tokens", "number", "key"),
            Column("bits", "number", "key"),
            Column("zeros", "number", "key"),
            Column("dead columns", "number", "key"),
            Column("rows rounded", "number", "key"),
            Column("outliers", "number", "key"),
            Column("damping", role="key"),
        ),
        tuple(rows),
    )


def _fallbacks(layers: Sequence[LayerReport]) -> Table:
    return Table(
        "fallbacks",
        "Fallbacks",
        "Layers that the method could not solve as asked, and what was done instead.",
        "No layer fell back.",
        (Column("layer"), Column("relative error", "number"), Column("tokens", "number"), Column("why", role="long")),
        tuple((one.name, one.relative_error, one.tokens, str(one.record.fallback)) for one in layers),
    )


def _samples(
    found: Output, against: str | Path, prompts: Sequence[str], device: str, dtype: str, progress: Progress
) -> list[Sample]:
    folders = [ModelFolder(path, allow_quantized=True) for path in (model_path(against), found.folder)]
    original, compressed = (continuations(folder, prompts, device, dtype, progress) for folder in folders)
    return [Sample(*texts) for texts in zip(prompts, original, compressed, strict=True)]
