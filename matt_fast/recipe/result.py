"""What a transfer gives back."""

from dataclasses import dataclass
from pathlib import Path

from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.initializers import InitReport
from matt_fast.training.loop import Progress


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
        progress: losses, tokens, seconds of training, and what was skipped.
        evaluations: "original", "initialised" and "trained", on the main process, if evaluation data was given.
        seconds: wall-clock seconds of each stage of the work, by name.
        training_memory, peak_memory: bytes in use at most, in training and in all; of the accelerator if there is one,
            else of this process (outside Linux both are those of all the work so far).
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
