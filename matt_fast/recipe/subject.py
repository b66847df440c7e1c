"""What a transfer's checks look at: its job, and what is made of it, once, as far as it can be made."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.alignment.mapping import map_tokens, own_rows
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import Side, sides_of
from matt_fast.data.summary import DataSummary, check_readable
from matt_fast.model.checkpoint_files import check_pointers, check_weights
from matt_fast.model.positions import position_limit
from matt_fast.model.teacher import Teacher
from matt_fast.recipe.job import Job


class NotLookedAt(Exception):
    """What a check needs could not be made; why was said where it was first needed."""


class Subject:
    """A transfer as its checks see it.

    Args:
        job: what is to be done.
        output: the folder that is to be written; None where nothing is.
        tell: called with what ("bytes", "tensors"), how many were read, and of how many.
        **made: "teacher" and "vocabulary", where they are there already.

    Raises (by each attribute):
        ValueError, TypeError, OSError: it cannot be made; only the first time.
        NotLookedAt: later.
    """

    def __init__(
        self,
        job: Job,
        output: str | Path | None,
        tell: Callable[[str, int, int | None], None] = lambda what, done, total: None,
        **made: Any,
    ):
        self.job, self.output, self.tell = job, output, tell
        self._made, self._failed = made, set()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made when it is first asked for."""
        if name in self._failed:
            raise NotLookedAt(name)
        if name not in self._made:
            self._failed.add(name)
            self._made[name] = make()
            self._failed.remove(name)
        return self._made[name]

    @property
    def teacher(self) -> Teacher:
        return self.once("teacher", lambda: Teacher(self.job.model, untie=self.job.untie, **self.job.hub_options))

    @property
    def other(self) -> Teacher | None:
        """The model to learn from, where it is another one."""
        return self.once("other", self.job.other_teacher)

    @property
    def outline(self) -> PreTrainedModel:
        """The model on the meta device, float32."""
        return self.once("outline", lambda: self.teacher.outline(torch.float32))

    @property
    def vocabulary(self) -> VocabularyPair:
        return self.once("vocabulary", lambda: load_vocabulary(self.job, self.teacher, self.outline, self.other))

    @property
    def unused(self) -> set[str]:
        """Names of tensors in the model's files that its class leaves out."""
        return self.once("unused", lambda: check_weights(self.teacher))

    @property
    def limit(self) -> int | None:
        """Tokens that the model has positions for."""
        return self.once("limit", lambda: position_limit(self.teacher.trunk(self.outline)))

    @property
    def data(self) -> DataSummary | None:
        """None where there is no text."""
        return None if self.job.data is None else self.once("data", lambda: self._readable("data", self.job.data))

    @property
    def held_out(self) -> dict[str, DataSummary]:
        """Of each held-out text, by its name."""
        texts = self.job.held_out
        return {
            name: self.once(f"eval_data {name}", partial(self._readable, "eval_data", texts[name])) for name in texts
        }

    @property
    def sides(self) -> tuple[Side, Side]:
        """The teacher's and the student's."""
        teacher, student = sides_of(self.vocabulary, self.job.max_length)
        if self.other is not None:
            rows = len(self.other.outline(torch.float32).get_input_embeddings().weight)
            teacher = replace(teacher, tokenizer=self.other.load_tokenizer(), rows=rows)
        return teacher, student

    @property
    def trainable(self) -> int:
        """Rows of a table that are trained."""
        return self.vocabulary.rows - len(self.vocabulary.matches) * self.job.freeze_shared

    def _readable(self, argument: str, place: str | Path) -> DataSummary:
        options = {"split": self.job.split, "text_field": self.job.text_field, "on_progress": self.tell}
        return check_readable(place, argument=argument, **options)


def load_vocabulary(
    job: Job, teacher: Teacher, outline: PreTrainedModel, other: Teacher | None = None
) -> VocabularyPair:
    """The two vocabularies of a job; a tokenizer that it was given is copied.

    Args:
        job: what is to be done.
        teacher, outline: the model, and it on the meta device.
        other: the model to learn from, where it is another one. Where the model has all tokens already, new ones are
            those that this one lacks, and train on from their own rows.

    Raises:
        ValueError: a file of the model or of the tokenizer is a pointer of git-lfs; rows that train on are to start
            otherwise; what `VocabularyPair` raises.
    """
    tokenizer = job.tokenizer
    for place in (job.model, tokenizer):
        if isinstance(place, str | Path) and Path(place).is_dir():
            check_pointers(Path(place))
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)  # it may get the teacher's chat template
    else:
        tokenizer = teacher.load_tokenizer(tokenizer)
    vocabulary = VocabularyPair(teacher.load_tokenizer(), tokenizer, len(outline.get_input_embeddings().weight))
    map_tokens(vocabulary, job.map_tokens)
    if other is not None and not vocabulary.new:
        own_rows(vocabulary, other.load_tokenizer())
        if vocabulary.new and (job.init_name, job.init_head) != ("mean", "same"):
            raise ValueError(
                "init: wanted mean and no init_head with a tokenizer that the model has already, whose rows train on "
                f"from what they are, got {job.init_name!r} and {job.init_head!r}; --init mean beside a recipe says so"
            )
    return vocabulary
