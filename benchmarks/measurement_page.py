"""Writes the tables and pictures of docs/measurements.md that come from benchmarks/methods.py and compress.py.

    python benchmarks/measurement_page.py

Tables stand between ``<!-- methods_MODEL.json -->``, or another mark, and ``<!-- end -->``. Pictures need the extra
``report``.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "measurements.md"
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"gemma-3-270m": "Gemma-3-270M", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
TARGETS = ("4 bit", "3 bit", "2 bit", "0.5", "2:4", "2:4 and 4 bit", "a quarter smaller", "W8A8")
TRAINED = "gptq, signed clip, scales refitted, damped, drift corrected by half, reconstructed"
SEARCHED = "sparsegpt, refined, drift corrected by half, reconstructed"
# The rows that built-in recipes have.
BEST = {
    f"4 bit: {TRAINED}": "best-w4a16",
    f"3 bit: {TRAINED}": "best-w3a16",
    f"2 bit: {TRAINED}": "best-w2a16",
    f"0.5: {SEARCHED}": "best-50",
    f"2:4: {SEARCHED}": "best-2:4",
    "W8A8: smoothquant, gptq": "best-w8a8",
}
# What the picture compares at each target: the plainest method, a plain one that looks at data, and ours.
COMPARED = {
    "4 bit": ("rtn", "gptq", TRAINED),
    "3 bit": ("rtn", "gptq", TRAINED),
    "2 bit": ("rtn", "gptq", TRAINED),
    "0.5": ("magnitude", "sparsegpt", SEARCHED),
    "2:4": ("magnitude", "sparsegpt", SEARCHED),
    "W8A8": ("rtn", "smoothquant, rtn", "smoothquant, gptq"),
}
# What is trained after it is solved, by target.
TRAININGS = {
    "4 bit": TRAINED.removesuffix(", reconstructed"),
    "3 bit": TRAINED.removesuffix(", reconstructed"),
    "2 bit": TRAINED.removesuffix(", reconstructed"),
    "2:4": SEARCHED.removesuffix(", reconstructed"),
}
# Words of the labels of what came with the reconstructed recipes.
NEWER = ("signed", "refitted", "drift corrected by half", "reconstructed")
KINDS = ("rounding or magnitude", "GPTQ, SparseGPT or SmoothQuant", "best-*")
COLOURS, SHAPES = ("#9aa3af", "#e07b1a", "#0b5cad"), ("triangle-up", "circle", "square")


def results(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def tables(model: str) -> str:
    """The tables of every target, the least KL first."""
    runs = results(f"methods_{model}")["runs"]
    found = []
    for target in TARGETS:
        chosen = {label: run for label, run in runs.items() if label.rpartition(": ")[0] == target}
        rows = [row(label, chosen[label]) for label in sorted(chosen, key=lambda label: chosen[label]["kl_mean"])]
        header = f"| {target} | bits | mean KL | perplexity | layer error | s | MB |"
        found.append("\n".join([header, "| --- " * 7 + "|", *rows]))
    return "\n\n".join(found)


def row(label: str, run: dict[str, Any]) -> str:
    """One method, as the tables show it."""
    fine = label.startswith("W8A8")
    mean, error = run["kl_mean"], run["layer_error"]
    digits = 4 if fine else 3 if mean < 10 else 1
    layer = "" if error is None else f"{error:.1e}" if fine else f"{error:.4f}"
    cells = [
        label.rpartition(": ")[2] + (f" (`{BEST[label]}`)" if label in BEST else ""),
        f"{run['bits_per_weight']:.2f}",
        f"{mean:.{digits}f} ± {run['kl_standard_error']:.{digits}f}",
        f"{run['perplexity']:,.1f}",
        f"{layer} {run['layer_error_measure'][:1]}".strip(),
        f"{run['seconds']:.0f}",
        f"{run['peak_memory_bytes'] / 1e6:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def trainings() -> str:
    """What training after a solver changes, on every model; ``methods_MODEL_float32.json`` has the rows."""
    kinds = {"": "solved", ", reconstructed": "reconstructed", ", distilled": "distilled"}
    rows = [f"| model | target | {' | '.join(f'{kind} | s' for kind in kinds.values())} |", "| --- " * 8 + "|"]
    for model, shown in MODELS.items():
        runs = results(f"methods_{model}_float32")["runs"]
        for target, label in TRAININGS.items():
            solved = runs.get(f"{target}: {label}")
            known = [runs.get(f"{target}: {label}{ending}") for ending in kinds]
            if solved is None or sum(run is not None for run in known) < 2:
                continue
            cells = [training(run, solved) if run is not None else " | " for run in known]
            rows.append(f"| {shown} | {target} | {' | '.join(cells)} |")
    return "\n".join(rows)


def training(run: dict[str, Any], solved: dict[str, Any]) -> str:
    """The two cells of a run."""
    change = "" if run is solved else f" ({run['kl_mean'] / solved['kl_mean'] - 1:+.1%})"
    return f"{run['kl_mean']:.3f} ± {run['kl_standard_error']:.3f}{change} | {run['seconds']:.0f}"


def gains() -> str:
    """The recipes with reconstruction beside the best plain composition of as many bits, on every model."""
    rows = [f"| target | {' | '.join(f'{name}: plain | `best-*` | change' for name in MODELS.values())} |"]
    rows.append("| --- " * (1 + 3 * len(MODELS)) + "|")
    for target, (*_, label) in COMPARED.items():
        if not label.endswith("reconstructed"):
            continue
        cells = [target]
        for model in MODELS:
            runs = results(f"methods_{model}")["runs"]
            best = runs[f"{target}: {label}"]
            others = [
                run
                for name, run in runs.items()
                if name.startswith(f"{target}: ")
                and not any(word in name for word in NEWER)
                and run["bits_per_weight"] <= best["bits_per_weight"] + 0.01
            ]
            before = min(others, key=lambda run: run["kl_mean"])
            change = best["kl_mean"] / before["kl_mean"] - 1
            cells += [f"{before['kl_mean']:.3f}", f"{best['kl_mean']:.3f}", f"{change:+.0%}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """The page with the tables of today's results."""
    parts = {f"<!-- methods_{model}.json -->": tables(model) for model in MODELS}
    parts |= {"<!-- best-* -->": gains(), "<!-- trainings -->": trainings()}
    for mark, table in parts.items():
        before, found, rest = page.partition(f"{mark}\n")
        _, end, after = rest.partition("<!-- end -->")
        assert found, f"no place for {mark}"
        assert end, f"no end of {mark}"
        page = f"{before}{found}\n{table}\n\n{end}{after}"
    return page


def methods_picture() -> Any:
    """KL of three kinds of methods at every target, both models; bars are standard errors over windows."""
    import altair as alt

    rows = []
    for model, shown in MODELS.items():
        runs = results(f"methods_{model}")["runs"]
        for target, labels in COMPARED.items():
            for kind, label in zip(KINDS, labels, strict=True):
                run = runs.get(f"{target}: {label}")
                if run is not None:
                    mean, error = run["kl_mean"], run["kl_standard_error"]
                    named = {"0.5": "half zero", "2:4": "2:4 zero"}.get(target, target)
                    place = {"model": shown, "target": named, "method": kind}
                    rows.append({**place, "KL": mean, "low": mean - error, "high": mean + error})
    axis = alt.X("KL:Q", scale=alt.Scale(type="log"), title="KL from the original, nats per token (log scale)")
    legend = alt.Legend(labelLimit=0, title=None)
    colour = alt.Color("method:N", scale=alt.Scale(domain=KINDS, range=COLOURS), legend=legend)
    shape = alt.Shape("method:N", scale=alt.Scale(domain=KINDS, range=SHAPES), legend=legend)
    order = [{"0.5": "half zero", "2:4": "2:4 zero"}.get(target, target) for target in COMPARED]
    base = alt.Chart().encode(y=alt.Y("target:N", sort=order, title=None), color=colour)
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(x=axis, shape=shape)
    bars = base.mark_rule().encode(x="low:Q", x2="high:Q")
    layered = alt.layer(bars, dots, data=alt.Data(values=rows)).properties(width=300, height=170)
    return layered.facet(column=alt.Column("model:N", title=None))


def speed_picture() -> Any:
    """Wall seconds of ours and the peers', one session for each model."""
    import altair as alt

    names = {"gptq": "GPTQ", "sparsegpt": "SparseGPT", "smoothquant": "SmoothQuant", "wanda": "Wanda"}
    files = {"SmolLM2-135M": "compress_smollm2-135m-instruct", "Gemma-3-270M": "compress_gemma-3-270m_second"}
    rows = [
        {"model": model, "method": names[run["method"]], "tool": run["tool"], "seconds": run["wall_seconds"]}
        for model, file in files.items()
        for run in results(file)["runs"]
        if run["method"] in names and run["round"] == 0
    ]
    tools = ["calibrant", "llm-compressor", "gptqmodel"]
    legend = alt.Legend(labelLimit=0, title=None)
    colour = alt.Color("tool:N", scale=alt.Scale(domain=tools, range=[*reversed(COLOURS)]), legend=legend)
    bars = alt.Chart().mark_bar().encode(color=colour, yOffset=alt.YOffset("tool:N", sort=tools))
    panels = [
        bars.properties(data=alt.Data(values=[row for row in rows if row["model"] == model]), width=300, title=model)
        .properties(height=alt.Step(14))
        .encode(
            x=alt.X("seconds:Q", title="wall seconds"),
            y=alt.Y("method:N", sort=[*names.values()], title=None, axis=alt.Axis(labelLimit=0)),
        )
        for model in files
    ]
    # Browsers' fonts may be wider than those that the picture is laid out with.
    return alt.hconcat(*panels).properties(padding={"left": 30, "right": 60, "top": 5, "bottom": 5})


def main() -> None:
    import vl_convert

    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, chart in {"methods": methods_picture(), "speed": speed_picture()}.items():
        drawn = chart.configure(font="system-ui, sans-serif").configure_view(stroke="#d5d9df")
        (ROOT / "docs" / "images" / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(drawn.to_json()))


if __name__ == "__main__":
    main()
