"""Scores on tasks of lm-evaluation-harness (extra `eval`), and several models' scores compared.

The one file that imports `lm_eval`, and only when a task is run.
"""

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from matt_fast.support.installing import install_line

if TYPE_CHECKING:  # arguments are checked before these are imported
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEW_SHOT_SEED, SEED = 1234, 0  # lm-eval's own
NO_FILTER = "none"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks are run, and how.

    Attributes:
        tasks: names of lm-eval's tasks, groups or tags, or of those in `folder`.
        few_shot: solved examples in front of each question; what the task says if None. Tasks that are meant without
            any stay without.
        limit: questions of each task, from its beginning; all if None.
        chat_template: put questions into the tokenizer's chat template.
        batch_size: sequences scored at a time.
        folder: of further tasks, YAML files as lm-eval reads them.
    """

    tasks: tuple[str, ...]
    few_shot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch_size: int = 1
    folder: str | Path | None = None


@dataclass(frozen=True)
class Score:
    """One model's score on a task.

    Attributes:
        value: as lm-eval gives it: accuracies from 0 to 1, BLEU from 0 to 100.
        stderr: its standard error; None where lm-eval gives none.
        by_question: the value of each question; empty where the score is not their mean.
    """

    value: float
    stderr: float | None
    by_question: list[float] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task.

    Attributes:
        task: its name.
        metric: lm-eval's name, with the filter of answers where there is one.
        few_shot: solved examples in front of each question.
        n: questions.
        higher_is_better: whether more is better.
        scores: model -> its score; the first is compared with.
        differences: model -> its score less the first's. The standard error is that of paired questions.
        recovered: model -> share of the gap between the first and the second that it closes, for models behind these:
            (its score - the second's) / (the first's - the second's). None where the second is no worse than the first.
    """

    task: str
    metric: str
    few_shot: int | None
    n: int
    higher_is_better: bool
    scores: dict[str, Score]
    differences: dict[str, Score] = field(default_factory=dict)
    recovered: dict[str, float | None] = field(default_factory=dict)


def check_installed() -> None:
    """Raise an ImportError unless lm-evaluation-harness is there."""
    if find_spec("lm_eval") is None:
        raise ImportError(f"tasks: wanted lm-evaluation-harness, which is not installed: {install_line('eval')}")


class Tasks:
    """The tasks of some options, found before a model is loaded.

    Raises:
        ImportError: lm-evaluation-harness is not there.
        ValueError: there is no task of a name. What lm-eval cannot read in `folder` is no task.
    """

    def __init__(self, options: TaskOptions):
        check_installed()
        self.options = options
        with _quiet():
            from lm_eval.tasks import TaskManager

            local = {"include_path": None if options.folder is None else str(options.folder)}
            self.manager = TaskManager(include_defaults=False, **local)
            if not set(options.tasks) <= set(self.manager.all_tasks):  # some 15,000 take seconds to list
                self.manager = TaskManager(**local)
        known = self.manager.all_tasks
        for name in options.tasks:
            if name not in known:
                near = get_close_matches(name, known, n=3)
                hint = f"; names like it: {', '.join(near)}" if near else ""
                raise ValueError(
                    f"tasks: wanted names of lm-eval's tasks or of those in task_folder, got {name!r}{hint}"
                )

    def load(self) -> dict:
        """The tasks with their data, as lm-eval's `evaluate` takes them.

        Raises:
            ValueError: a task cannot be loaded; its data may be on the hub.
        """
        try:
            loaded = self.manager.load(list(self.options.tasks))
        except Exception as error:  # datasets raises many kinds
            names = ", ".join(self.options.tasks)
            raise ValueError(f"tasks: {names} could not be loaded: {type(error).__name__}: {error}") from error
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (self.options.few_shot is not None and own != 0):
                task.set_config(key="num_fewshot", value=self.options.few_shot or 0)
            task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        return loaded

    def run(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[TaskScore]:
        """One model's scores, in a `TaskScore` for each metric, under the name "".

        Args:
            model: a causal language model, on its device.
            tokenizer: its own.

        Raises:
            ValueError: what `load` raises, or the tokenizer has no chat template.
        """
        import numpy as np
        import torch

        options = self.options
        if options.chat_template and not tokenizer.chat_template:
            raise ValueError("chat_template: wanted a tokenizer with a chat template, got one without")
        random.seed(SEED)  # as lm-eval's own command: some tasks shuffle their answers
        np.random.seed(FEW_SHOT_SEED)  # noqa: NPY002
        torch.manual_seed(FEW_SHOT_SEED)
        with _quiet():
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM

            loaded = self.load()
            scorer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=options.batch_size)
            chat = {"apply_chat_template": options.chat_template, "fewshot_as_multiturn": options.chat_template}
            found = evaluate(scorer, loaded, limit=options.limit, bootstrap_iters=1000, log_samples=True, **chat)
        return list(_scores(found))


def compare(found: Mapping[str, Sequence[TaskScore]]) -> list[TaskScore]:
    """The scores of several models on the same tasks, as one list.

    Args:
        found: model -> what `Tasks.run` gave for it.
    """
    first, *others = found
    rows = []
    for index, row in enumerate(found[first]):
        scores = {model: each[index].scores[""] for model, each in found.items()}
        differences = {model: _difference(scores[model], scores[first]) for model in others}
        gap = scores[first].value - scores[others[0]].value if others else 0.0
        worse = gap > 0 if row.higher_is_better else gap < 0
        recovered = {x: 1 + differences[x].value / gap if worse else None for x in others[1:]}
        facts = row.task, row.metric, row.few_shot, row.n, row.higher_is_better
        rows.append(TaskScore(*facts, scores, differences, recovered))
    return rows


def _difference(score: Score, reference: Score) -> Score:
    """A score less another; the standard error is that of the questions' differences."""
    pairs = list(zip(score.by_question, reference.by_question, strict=False))
    each = [mine - other for mine, other in pairs]
    stderr = None
    if len(each) > 1 and len(score.by_question) == len(reference.by_question):
        mean = sum(each) / len(each)
        stderr = math.sqrt(sum((x - mean) ** 2 for x in each) / (len(each) - 1) / len(each))
    return Score(score.value - reference.value, stderr, each if stderr is not None else [])


def _scores(found: Mapping) -> Iterator[TaskScore]:
    """Each metric of each task and group of lm-eval's results."""
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, comma, answers = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{name}_stderr,{answers}")
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            samples = [x for x in found.get("samples", {}).get(task, ()) if x["filter"] == answers and name in x]
            each = [float(x[name]) for x in samples if isinstance(x[name], int | float)]
            is_mean = bool(each) and math.isclose(sum(each) / len(each), value, rel_tol=1e-9, abs_tol=1e-12)
            yield TaskScore(
                task=task,
                metric=name if answers == NO_FILTER else f"{name} ({answers})",
                few_shot=found["n-shot"].get(task),
                n=metrics.get("sample_len") or len(samples),
                higher_is_better=found["higher_is_better"].get(task, {}).get(name) is not False,
                scores={"": Score(float(value), stderr, each if is_mean else [])},
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log, but for its errors, off the screen."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
