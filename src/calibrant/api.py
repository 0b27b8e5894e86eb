"""The public functions of the main job. Each joins rooms and contains no algorithm."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.corpus import BUILTIN, Corpus
from calibrant.calibration.generate import DEFAULT_LENGTH
from calibrant.engine.compress_blocks import Order
from calibrant.engine.importance import input_squares, linear_names, stored_names
from calibrant.errors import CalibrantError
from calibrant.evaluation.comparison import Evaluation
from calibrant.evaluation.engines.ask import ENGINES, EngineName
from calibrant.formats.gguf_names import gguf_library, gguf_names
from calibrant.formats.imatrix import ImportanceMatrix, write_imatrix
from calibrant.formats.quantized import FormatName
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.hub import model_path
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import torch_device, torch_dtype
from calibrant.output_folder import check_file, whole_file
from calibrant.pipeline.comparison import Comparison, compare_outputs
from calibrant.pipeline.evaluator import Evaluator, reference_of, text_windows
from calibrant.pipeline.output import Output
from calibrant.pipeline.prepare import check_calibration, prepare
from calibrant.pipeline.proof import Proof
from calibrant.pipeline.prove import Question, prove_in_engine
from calibrant.pipeline.record import RECORD_NAME, RunReport, keep_proof
from calibrant.pipeline.status import RunStatus, run_status
from calibrant.pipeline.write_gguf import EmbeddingType, GgufExport, GgufFile
from calibrant.progress import NoProgress, Progress
from calibrant.recipes.recipe import DEFAULT_RECIPE, Recipe


def compress(
    model: str | Path,
    *,
    output: str | Path,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    bits: int | None = None,
    group_size: int | None = None,
    calibration: CalibrationSet | str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    draw: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    order: Order = "sequential",
    checkpoint_format: FormatName = "compressed-tensors",
    overwrite: bool = False,
    allow_encoder: bool = False,
    dequantize: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Compress a model folder into ``output``. ``prepare`` takes the same arguments and only checks and estimates.

    Args:
        model: a model folder, or ``hub:owner/name``.
        output: the folder to write.
        recipe: a built-in name, a YAML file or a ``Recipe``; ``bits`` and ``group_size`` (0: one scale per channel)
            replace those of its weights.
        calibration: a set or its folder. Without one, a method that needs data gets a set the model writes itself.
        samples: rows of that set (None: 128); ``length`` their tokens (None: 512, or the model's context if that is
            shorter); ``draw`` numbers independent sets of one seed (None: 0). Refused beside a given set.
        seed: of that set, and of a training whose recipe has none.
        device: "cpu" or "cuda".
        dtype: what forward passes compute in: "bfloat16", "float32", or "auto" (bfloat16 where the processor
            multiplies it fast).
        order: "sequential" (solve each input group on the outputs of the compressed groups before it, in one pass),
            "two-pass" (collect a block's statistics, solve, run it again) or "independent" (every block gets the
            original model's hidden states).
        checkpoint_format: "compressed-tensors", "gptq", "awq" or "gguf"; types of GGUF files imply the last.
        overwrite: replace an earlier output.
        allow_encoder: also accept models that are not causal (BERT classifiers).
        dequantize: take a quantized model for the dense one that it stands for: its weights are decoded as they are
            read. Without it, quantized models are refused.
        memory: how much the run may use, such as "6GB" or a number of bytes; None: what is free. Where that is too
            little for the hidden states of all rows, files hold them and what waits for a solve, with the same result.
            A model that does not fit writes no calibration set: without one, the built-in corpus takes its place.
        progress: receives progress and notes; None for silence.

    Raises:
        CalibrantError: something does not fit, or the output cannot be written; nothing is left behind.
    """
    return prepare(
        model,
        output=output,
        recipe=recipe,
        bits=bits,
        group_size=group_size,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        draw=draw,
        device=device,
        dtype=dtype,
        order=order,
        checkpoint_format=checkpoint_format,
        overwrite=overwrite,
        allow_encoder=allow_encoder,
        dequantize=dequantize,
        memory=memory,
    ).run(progress)


def status(output: str | Path) -> RunStatus:
    """Where the run of ``compress``, ``generate`` or ``select`` is that writes to the folder ``output``.

    Raises:
        CalibrantError: the run's journal or its output is damaged.
    """
    return run_status(Path(output))


def write_importance_matrix(
    model: str | Path,
    *,
    calibration: CalibrationSet | str | Path,
    output: str | Path,
    device: str = "cpu",
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """Write llama.cpp's importance matrix of ``model`` on a calibration set, a GGUF file.

    Layers without a name there are left out, with a note and in the result.

    Raises:
        CalibrantError: model or set do not fit, or no layer has a name.
    """
    target = check_file(output, overwrite, b"GGUF")
    gguf_library()
    given = calibration if isinstance(calibration, CalibrationSet) else CalibrationSet.load(calibration)
    folder = ModelFolder(model_path(model))
    check_calibration(folder, given)
    place = torch_device(device)
    lazy = LazyModel(folder, torch_dtype(dtype, place), place)
    blocks = find_blocks(lazy.module)
    progress = progress or NoProgress()
    text = folder.config.get_text_config()
    linears = linear_names(lazy, blocks)
    if linears:  # a model without a name for any of them is refused before its blocks are read
        gguf_names(text, len(blocks), stored_names(lazy, linears))
    sums = input_squares(lazy, blocks, given.rows, progress)
    names = gguf_names(text, len(blocks), stored_names(lazy, sums))
    named = {one.name: one.rows(*sums[layer]) for layer, tensors in names.tensors.items() for one in tensors}
    rows, length = given.tokens.shape
    with whole_file(target) as beside:
        write_imatrix(beside, named, [f"calibrant:sha256:{given.sha256}"], rows, length)
    for sentence in names.notes():
        progress.note(sentence)
    return ImportanceMatrix(names.architecture, tuple(sorted(named)), names.left_out)


def write_gguf(
    model: str | Path,
    *,
    output: str | Path,
    embeddings: EmbeddingType = "Q8_0",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GgufFile:
    """Write a compressed or original model as a GGUF file, which llama.cpp runs
    (docs/gguf.md "GGUF files").

    Symmetric codes in groups that 32 divides, with scales that float16 holds, are stored without loss.

    Args:
        model: an output of ``compress``, a model folder, or ``hub:owner/name``.
        output: the file to write.
        embeddings: type of the embeddings and of the output matrix: "Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0", or "stored"
            for theirs. Where super-blocks do not divide the width, K types become those that llama.cpp takes then.
        overwrite: replace an earlier GGUF file.
        progress: receives progress and notes; None for silence.

    Raises:
        CalibrantError: the extra ``gguf`` is not installed, or llama.cpp cannot hold the model or its tokenizer.
    """
    target, listener = check_file(output, overwrite, b"GGUF"), progress or NoProgress()
    export = GgufExport(ModelFolder(model_path(model), allow_quantized=True), embeddings, listener)
    with whole_file(target) as beside:
        written = export.write(beside)
    for sentence in written.notes:
        listener.note(sentence)
    return written


def prove(
    model: str | Path,
    *,
    engine: EngineName = "transformers",
    python: str | Path | None = None,
    against: str | Path | None = None,
    text: str | Path | Corpus = BUILTIN,
    length: int = 64,
    windows: int = 2,
    new_tokens: int = 24,
    gguf: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int = 1,
    progress: Progress | None = None,
) -> Proof:
    """Load ``model`` in an engine and compare what it computes with the stored values
    (docs/engines.md "Proof in the engine").

    The result is kept in the record and the model card of an output of ``compress``, whether the engine agrees or not.

    Args:
        model: an output of ``compress``, or a model folder.
        engine: "transformers", "vllm" or "llama.cpp".
        python: the Python of the environment that has the engine; None for this one.
        against: the original, from which the engine's divergence is measured.
        text: what log-probabilities are compared on: ``windows`` windows of ``length`` tokens.
        new_tokens: tokens that the engine writes after the first half of the first window.
        gguf: the GGUF file for llama.cpp; None for one that is written now.
        dtype: what transformers or vLLM compute in.
        device: where transformers computes; vLLM takes what its installation is made for.
        threads: of llama.cpp.
        progress: receives progress and notes; None for silence.

    Raises:
        CalibrantError: the engine is not installed, fails on the model, or disagrees.
    """
    if engine not in ENGINES:
        raise CalibrantError(f"{engine}: no such engine; there are {', '.join(ENGINES)}")
    torch_dtype(dtype, torch_device(device))
    for what, count, least in (
        ("windows", windows, 1), ("new tokens", new_tokens, 1), ("threads", threads, 1), ("length", length, 2)
    ):  # fmt: skip
        if count < least:
            raise CalibrantError(f"{what} {count}: need at least {least}")
    listener = progress or NoProgress()
    folder = ModelFolder(model_path(model), allow_quantized=True)
    tokenizer = Tokenizer(folder.path)
    reference = None if against is None else reference_of(folder, tokenizer, against)
    found = text_windows(folder, tokenizer, text, length, windows, listener)
    question = Question(found, new_tokens, dtype, device, threads)
    proof = prove_in_engine(
        folder,
        engine,
        None if python is None else Path(python),
        question,
        against=reference,
        gguf=None if gguf is None else Path(gguf),
        progress=listener,
    )
    if (folder.path / RECORD_NAME).is_file():
        keep_proof(folder.path, proof)
    if not proof.agrees:
        raise CalibrantError(
            f"{folder.path}: {engine} {proof.version} does not compute what is stored, do not serve it there: "
            f"{proof.disagreement}"
        )
    return proof


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | Corpus | None = BUILTIN,
    length: int = DEFAULT_LENGTH,
    wikitext: str | Path | None = None,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    limit: int | None = None,
    task_limit: int | None = None,
    save: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of ``model``, its scores on tasks and, with ``against``, its differences from that model.

    Models are loaded by transformers, whole.

    Args:
        model: a model folder, or ``hub:owner/name``.
        against: the original, of which the same is measured: divergence of next-token distributions, paired
            comparisons of tasks.
        text: held-out text, cut into windows of ``length`` tokens; None for none.
        length: tokens per window of ``text``.
        wikitext: WikiText's raw file, measured by the papers' protocol (windows of 2,048 tokens) besides.
        tasks: names of lm-eval's tasks, for example "piqa" and "arc_easy".
        data: the folder of the tasks' files, or "hub:" to load each task's data set from the hub.
        limit: use the first windows of each text and the first items of each task (of each subject of MMLU) only.
        task_limit: items of each task in place of ``limit``.
        save: keep the result in the model's folder, an output of ``compress``, as ``evaluation.json``, where
            ``write_run_report`` and ``compare`` find it.
        device: "cpu" or "cuda".
        dtype: what forward passes compute in: "bfloat16", "float32" or "auto".
        progress: receives progress and notes; None for silence.

    Raises:
        CalibrantError: a model, a text or a task does not fit.
    """
    progress = progress or NoProgress()
    evaluator = Evaluator(
        against=against,
        text=text,
        length=length,
        wikitext=wikitext,
        tasks=tasks,
        data=data,
        limit=limit,
        task_limit=task_limit,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    return evaluator.evaluate(model, save)


def compare(
    folders: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    text: str | Path | Corpus | None = None,
    length: int = DEFAULT_LENGTH,
    wikitext: str | Path | None = None,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    limit: int | None = None,
    task_limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Comparison:
    """Compare compressed models by what their folders record; evaluations that were saved there are shown.

    With ``against``, ``text``, ``wikitext`` or ``tasks`` every model is evaluated now, as ``evaluate`` does with the
    same arguments (``against`` alone takes its text), and saved evaluations are not looked at. All arguments but
    ``folders`` are those of ``evaluate``.

    Args:
        folders: outputs of ``compress``.
        progress: receives progress and notes; None for silence.

    Raises:
        CalibrantError: a folder is no output, or an evaluation fails.
    """
    outputs = [Output.read(folder) for folder in folders]
    named = compare_outputs(outputs)
    if text is None and wikitext is None and not tasks:
        if against is None:
            return named
        text = BUILTIN
    progress = progress or NoProgress()
    with TemporaryDirectory(prefix="calibrant-") as folder:
        scratch = Path(folder) if len(named.outputs) > 1 else None
        evaluator = Evaluator(
            against=against,
            text=text,
            length=length,
            wikitext=wikitext,
            tasks=tasks,
            data=data,
            limit=limit,
            task_limit=task_limit,
            device=device,
            dtype=dtype,
            progress=progress,
            scratch=scratch,
        )
        evaluations = {name: evaluator.evaluate(output.folder) for name, output in named.outputs.items()}
    return replace(named, evaluations=evaluations)
