"""Compressed models side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from calibrant.errors import CalibrantError
from calibrant.evaluation.comparison import Evaluation
from calibrant.output_folder import whole_file
from calibrant.pipeline.output import Output, scheme_text
from calibrant.pipeline.quality import kl_estimate, quality_table
from calibrant.report.comparison_page import PAGE_MARK, comparison_page
from calibrant.report.page import is_replaceable
from calibrant.report.tables import Column, Table, Undefined, Value, value_text
from calibrant.wording import listed

_NO_SET = Undefined("the recipe uses no calibration data")
_NO_BITS = Undefined("its layers are not stored one by one")
_NO_LAYER = Undefined("no layer of this kind was solved")


@dataclass(frozen=True)
class Comparison:
    """Outputs by name, and the evaluation of those that have one."""

    outputs: Mapping[str, Output]
    evaluations: Mapping[str, Evaluation]

    @property
    def findings(self) -> list[str]:
        """What readers must know before they compare, and the best by KL, in sentences."""
        return [*self._models(), *self._sets(), *self._quality()]

    @property
    def tables(self) -> list[Table]:
        """Models, errors by kind, quality, fallbacks."""
        return [self._outputs(), self._errors(), quality_table(self.evaluations), self._fallbacks()]

    def write_page(self, file: str | Path) -> Path:
        """Write the comparison as one HTML file that works offline; an earlier page is replaced.

        Raises:
            CalibrantError: the file cannot be written, or is something else.
        """
        target = Path(file)
        if not is_replaceable(target, PAGE_MARK):
            raise CalibrantError(f"{target}: exists and is no page of a comparison; choose another file")
        page = comparison_page(list(self.outputs), self.findings, self.tables)
        with whole_file(target) as beside:
            beside.write_text(page, encoding="utf-8")
        return target

    def as_json(self) -> dict[str, Any]:
        """Findings and numbers as JSON values."""
        return {
            "findings": self.findings,
            "models": {name: self._one_as_json(name, output) for name, output in self.outputs.items()},
        }

    def _one_as_json(self, name: str, output: Output) -> dict[str, Any]:
        evaluation, manifest = self.evaluations.get(name), output.record.calibration
        return {
            "recipe": output.record.recipe.name,
            "method": output.record.recipe.method.name,
            "scheme": scheme_text(output.record.recipe.scheme),
            "stored_bits": output.stored_bits,
            "bytes": output.report.bytes_after,
            "seconds": output.report.seconds,
            "peak_memory_bytes": output.report.peak_memory_bytes,
            "set_sha256": None if manifest is None else manifest.set_sha256,
            "errors": output.errors_by_kind(),
            "fallbacks": {layer.name: layer.record.fallback for layer in output.report.fallbacks},
            "evaluation": None if evaluation is None else asdict(evaluation),
        }

    def _models(self) -> list[str]:
        """Outputs of different originals are not comparable."""
        of_model: dict[str, list[str]] = {}
        for name, output in self.outputs.items():
            of_model.setdefault(output.record.model["weights_sha256"], []).append(name)
        if len(of_model) < 2:
            return []
        groups = "; ".join(listed(names) for names in of_model.values())
        return [f"These were not made from the same original, so their errors do not compare: {groups}."]

    def _sets(self) -> list[str]:
        same: dict[str, list[str]] = {}
        for name, output in self.outputs.items():
            if output.record.calibration is not None:
                same.setdefault(output.record.calibration.set_sha256, []).append(name)
        return [f"{listed(names)} were made with the same calibration set." for names in same.values() if names[1:]]

    def _quality(self) -> list[str]:
        known = {name: one for name, one in self.evaluations.items() if one.divergence is not None}
        if len({one.windows_sha256 for one in known.values()}) > 1:
            return ["The evaluations are not of the same text, so they do not compare."]
        kl = sorted((kl_estimate(one).value, name) for name, one in known.items())
        if len(kl) < 2:
            return []
        (_, best), (_, second) = kl[:2]
        nearest = "nearer" if len(kl) == 2 else "nearest"
        said = (value_text(kl_estimate(known[name])) for name in (best, second))
        return [f"{best} is {nearest} to the original: KL {next(said)}, before {second}: {next(said)}."]

    def _outputs(self) -> Table:
        rows: list[tuple[Value, ...]] = []
        for name, output in self.outputs.items():
            record, report, bits = output.record, output.report, output.stored_bits
            manifest = record.calibration
            source: tuple[Value, Value, Value] = (_NO_SET, _NO_SET, _NO_SET)
            if manifest is not None:
                size = f"{manifest.samples} x {manifest.length}"
                source = manifest.strategy, size, manifest.set_sha256[:8]
            numbers = (_NO_BITS if bits is None else bits, report.bytes_after / 1e6, sum(report.seconds.values()))
            place = (name, record.model["name"], record.recipe.name, record.recipe.method.name)
            memory = report.peak_memory_bytes / 1e6
            fallbacks = len(report.fallbacks)
            rows.append((*place, scheme_text(record.recipe.scheme), *numbers, memory, *source, fallbacks))
        return Table(
            "models",
            "Models",
            "What each model is and what it cost. Bits per weight: of the compressed layers as they are on disk, "
            "scales and zeros included. Peak memory is that of the whole process. Sets with one hash are the same.",
            "There are no models.",
            (
                Column("model"),
                Column("original", role="key"),
                Column("recipe", role="key"),
                Column("method", role="key"),
                Column("scheme", role="key"),
                Column("bits per weight", "number"),
                Column("size, MB", "number"),
                Column("seconds", "number"),
                Column("peak memory, MB", "number"),
                Column("set", role="key"),
                Column("rows x tokens", role="key"),
                Column("set hash", role="key"),
                Column("fallbacks", "number"),
            ),
            tuple(rows),
        )

    def _errors(self) -> Table:
        errors = {name: output.errors_by_kind() for name, output in self.outputs.items()}
        kinds = list(dict.fromkeys(kind for own in errors.values() for kind in own))
        measures = {name: {layer.measure for layer in output.layers} for name, output in self.outputs.items()}
        differ = any(one != other for one, other in combinations([own for own in measures.values() if own], 2))
        return Table(
            "errors",
            "Error by kind of layer",
            "Mean relative error over the blocks, each measured on the model's own calibration set."
            + (" They are not measured alike: see Layers on each model's own page." if differ else ""),
            "No layer was solved one by one.",
            (Column("kind"), *(Column(name, "number") for name in self.outputs)),
            tuple((kind, *(own.get(kind, _NO_LAYER) for own in errors.values())) for kind in kinds),
        )

    def _fallbacks(self) -> Table:
        return Table(
            "fallbacks",
            "Fallbacks",
            "Layers that a method could not solve as asked, and what was done instead.",
            "No layer fell back.",
            (Column("model"), Column("layer"), Column("why", role="long")),
            tuple(
                (name, layer.name, str(layer.record.fallback))
                for name, output in self.outputs.items()
                for layer in output.report.fallbacks
            ),
        )


def compare_outputs(outputs: Sequence[Output]) -> Comparison:
    """The comparison of outputs with the evaluations in their folders; names that repeat are paths.

    Raises:
        CalibrantError: there is no output, or one is named twice.
    """
    if not outputs:
        raise CalibrantError("no compressed model is named")
    short = [output.name for output in outputs]
    names = short if len(set(short)) == len(short) else [str(output.folder) for output in outputs]
    if len(set(names)) < len(names):
        raise CalibrantError(f"{next(name for name in names if names.count(name) > 1)}: named twice")
    named = dict(zip(names, outputs, strict=True))
    saved = {name: output.evaluation for name, output in named.items() if output.evaluation is not None}
    return Comparison(named, saved)
