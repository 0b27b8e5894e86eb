"""Evaluating one or several models on the same texts and tasks, against the same original."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import transformers

from calibrant.calibration.corpus import Corpus
from calibrant.calibration.generate import check_length
from calibrant.errors import CalibrantError
from calibrant.evaluation.comparison import Evaluation, evaluate_models
from calibrant.evaluation.original import Original, RememberingOriginal, WholeOriginal
from calibrant.evaluation.recorded import save_evaluation
from calibrant.evaluation.tasks.data_files import check_tasks
from calibrant.evaluation.tasks.results import TaskResult, compare_tasks
from calibrant.evaluation.text import EvaluationText, evaluation_windows, wikitext_windows
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.linears import use_fast_linears
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.modeling.whole_model import load_whole
from calibrant.pipeline.record import RECORD_NAME
from calibrant.progress import Progress


@dataclass(kw_only=True)
class Evaluator:
    """What ``calibrant.evaluate`` is asked for, by the same names; ``scratch`` is an empty folder, or None.

    The original is loaded once. With ``scratch`` its blocks run once per window and its tasks are scored once, however
    many models are compared with it.

    Raises:
        CalibrantError: numbers do not fit, or a task is unknown or its files are missing.
    """

    against: str | Path | None
    text: str | Path | Corpus | None
    length: int
    wikitext: str | Path | None
    tasks: Sequence[str]
    data: str | Path | None
    limit: int | None
    task_limit: int | None
    device: str
    dtype: str
    progress: Progress
    scratch: Path | None = None
    _original: transformers.PreTrainedModel | None = field(default=None, init=False)
    _remembering: Original | None = field(default=None, init=False)
    _original_tasks: tuple[TaskResult, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        limit, task_limit = self.limit, self.task_limit
        if self.length < 2 or min(limit or 1, task_limit or 1) < 1 or 0 in (limit, task_limit):
            raise CalibrantError(
                f"length {self.length}, limit {limit}, task limit {task_limit}: need windows of at least 2 tokens, "
                "and at least 1 window or item"
            )
        if self.text is None and self.wikitext is None and not self.tasks:
            raise CalibrantError("nothing to evaluate on; give `text`, `wikitext` or `tasks`")
        if self.tasks:
            check_tasks(self.tasks, self.data)

    def evaluate(self, model: str | Path, save: bool = False) -> Evaluation:
        """Evaluate ``model``; see ``calibrant.evaluate``."""
        folder = ModelFolder(model_path(model), allow_quantized=True)
        record = folder.path / RECORD_NAME
        if save and not record.is_file():
            raise CalibrantError(
                f"{folder.path}: no compressed model of Calibrant, so `save` has nowhere to keep the result"
            )
        tokenizer = Tokenizer(folder.path)
        reference = None if self.against is None else reference_of(folder, tokenizer, self.against)
        windows = None
        if self.text is not None:
            windows = text_windows(folder, tokenizer, self.text, self.length, self.limit, self.progress)
        context = folder.context_length
        papers = None if self.wikitext is None else wikitext_windows(self.wikitext, tokenizer, context, self.limit)
        for found in (windows, papers):
            if found is not None and int(found.windows.max()) >= folder.vocabulary:
                raise CalibrantError(
                    f"{folder.path}: its tokenizer gives ids beyond the model's vocabulary of {folder.vocabulary}"
                )
        loaded = self._load(folder)
        if reference is not None and self._original is None:
            self._original = self._load(reference)
            if self.scratch is not None:
                self._remembering = RememberingOriginal(self._original, self.scratch)
        original = self._original
        compared = self._remembering or (None if original is None else WholeOriginal(original))
        result = Evaluation(0, 0, 0, 0)
        if windows is not None:
            result = evaluate_models(loaded, compared, windows, self.progress)
        if papers is not None:
            result = replace(result, wikitext=evaluate_models(loaded, compared, papers, self.progress))
        if self.tasks:
            result = replace(result, tasks=self._scores(loaded, tokenizer))
            if original is not None:
                if self._original_tasks is None:
                    self._original_tasks = self._scores(original, tokenizer)
                theirs = self._original_tasks
                result = replace(result, original_tasks=theirs, task_comparisons=compare_tasks(result.tasks, theirs))
        if save:
            save_evaluation(folder.path, record, result)
        return result

    def _load(self, folder: ModelFolder) -> transformers.PreTrainedModel:
        model = load_whole(folder, self.device, self.dtype)
        use_fast_linears(model, model.dtype, model.device)
        return model

    def _scores(self, model: transformers.PreTrainedModel, tokenizer: Tokenizer) -> tuple[TaskResult, ...]:
        from calibrant.evaluation.tasks.score import score_tasks  # lm-eval is an extra

        assert self.data is not None  # check_tasks
        items = self.limit if self.task_limit is None else self.task_limit
        return score_tasks(model, tokenizer, self.tasks, self.data, items, self.progress)


def text_windows(
    folder: ModelFolder,
    tokenizer: Tokenizer,
    text: str | Path | Corpus,
    length: int,
    limit: int | None,
    progress: Progress,
) -> EvaluationText:
    """At most ``limit`` windows of ``length`` tokens of ``text``, for the model in ``folder``.

    Raises:
        CalibrantError: the text is too short, or the model does not take ``length`` tokens.
    """
    check_length(folder, length)
    corpus = text if isinstance(text, Corpus) else Corpus(text)
    found = evaluation_windows(corpus, tokenizer, length, limit)
    for note in corpus.notes:
        progress.note(note)
    return found


def reference_of(folder: ModelFolder, tokenizer: Tokenizer, against: str | Path) -> ModelFolder:
    """The model ``against``, which that in ``folder`` can be compared with.

    Raises:
        CalibrantError: their tokenizers or vocabularies differ.
    """
    reference = ModelFolder(model_path(against), allow_quantized=True)
    if Tokenizer(reference.path).sha256 != tokenizer.sha256 or reference.vocabulary != folder.vocabulary:
        raise CalibrantError(
            f"{against}: its tokenizer or vocabulary differs from {folder.path}'s, so they cannot be compared"
        )
    return reference
