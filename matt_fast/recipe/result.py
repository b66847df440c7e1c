"""What a transfer gives back."""

from dataclasses import dataclass, field
from pathlib import Path

from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.initializers import InitReport
from matt_fast.report.words import DIGITS
from matt_fast.runs.record import HELD_OUT
from matt_fast.training.state import Progress

GROWN = 2  # times its start: more than the difference between batches


@dataclass
class Healing:
    """What the training of rows and layers together did.

    Attributes:
        method: "lora", "outer" or "full".
        trained_numbers: numbers in the layers that were trained, or in the adapters beside them.
        progress, validation, best_step: as in `TransferResult`.
    """

    method: str
    trained_numbers: int
    progress: Progress
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None


@dataclass(frozen=True)
class SnippetCounts:
    """What the teacher wrote around new tokens that the text has too seldom.

    Attributes:
        wanted: how often each token should come.
        seldom: tokens that come fewer times in the text, or all where there is none.
        enough, fewer, absent: those of them that come so often with the snippets, fewer times, and still never.
        snippets, dropped: texts that were kept, and those that did not use their token.
        generated: tokens that the teacher drew for them.
    """

    wanted: int
    seldom: int
    enough: int
    fewer: int
    absent: int
    snippets: int
    dropped: int
    generated: int

    def message(self) -> str:
        """What a person should know, in one line."""
        return (
            f"the teacher wrote {self.snippets:,} for {self.seldom:,} new tokens that come fewer than {self.wanted} "
            f"times in the text ({self.dropped:,} more did not use theirs and were dropped); with them "
            f"{self.enough:,} of these come {self.wanted} times or more, {self.fewer:,} fewer times, "
            f"{self.absent:,} never"
        )


@dataclass(frozen=True)
class Rehearsal:
    """What the teacher wrote of its own.

    Attributes:
        texts, characters: of it.
    """

    texts: int
    characters: int

    def message(self) -> str:
        """What a person should know, in one line."""
        return (
            f"a fifth of the chunks are of {self.texts:,} texts, {self.characters:,} characters, that the teacher "
            "wrote of its own"
        )


@dataclass
class TransferResult:
    """What a transfer did.

    Attributes:
        output: the folder written.
        n_layers: layers run in training; the loss was at the attention of the last.
        shared, new: student tokens that the teacher has, and that it has not.
        unspelled: new tokens that the teacher's tokens cannot spell, special ones among them.
        report: where the input rows started, and which of them stand out.
        trainable, seen: rows that were trainable, and those of them that occurred in training.
        progress: losses, tokens, seconds of training, and what was skipped; both counts are of all processes.
        evaluations: "original", "initialised" and "trained" on the held-out text, the first where there are several;
            empty without one.
        text: the name of that held-out text.
        other_texts: the same for each further text, by its name.
        completions: "prompt", the name of the "text" that it begins, and what the "original" and the "adapted" model
            write behind it.
        seconds: wall-clock seconds of each stage of the work, by name.
        training_memory, peak_memory: bytes in use at most, in training and in all; of the accelerator if there is one,
            else of this process (outside Linux both are those of all the work so far).
        validation: (step, bits per byte) of each validation during training.
        best_step: the one of them whose rows became the result; None without validation.
        healing: of rows and layers together; None where there was none.
        snippets: that the teacher wrote; None where none were asked for.
        rehearsal: what the teacher wrote of its own; None where it was not asked to.
    """

    output: Path
    n_layers: int
    shared: int
    new: int
    unspelled: int
    report: InitReport
    trainable: int
    seen: int
    progress: Progress
    evaluations: dict[str, Evaluation]
    seconds: dict[str, float]
    training_memory: int
    peak_memory: int
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    healing: Healing | None = None
    text: str = HELD_OUT
    other_texts: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    snippets: SnippetCounts | None = None
    rehearsal: Rehearsal | None = None
    completions: list[dict[str, str]] = field(default_factory=list)

    @property
    def worse_than_start(self) -> str | None:
        """What was measured and is worse behind training than before; None where nothing is."""
        before, after = (self.evaluations.get(name) for name in ("initialised", "trained"))
        if before is not None and after is not None:
            now, then = (round(x.bits_per_byte, DIGITS) for x in (after, before))
            worse = not now <= then  # it may be NaN
            return f"bits per byte {now:.{DIGITS}f} after training, {then:.{DIGITS}f} before" if worse else None
        losses = [loss for loss in self.progress.losses if loss > 0]  # 0 where a batch had nothing to predict
        few = max(1, len(losses) // 10)
        first, last = (sum(part) / len(part) for part in (losses[:few], losses[-few:])) if losses else (0.0, 0.0)
        return f"loss {last:.3g} at the end of training, {first:.3g} at its start" if last > GROWN * first else None
