"""Several models measured on the same texts, tasks and prompts: the original first, and what was made of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.data.documents import read_documents
from matt_fast.evaluation.bits_per_byte import Evaluation, evaluate
from matt_fast.evaluation.completions import complete, completion_bytes
from matt_fast.evaluation.intervals import Interval, bits_interval, ratio_interval
from matt_fast.evaluation.speed import ROUNDS, Speed, measure_speed, passages
from matt_fast.evaluation.tasks import TaskOptions, Tasks, TaskScore, compare
from matt_fast.model.checkpoint_files import check_weights
from matt_fast.model.teacher import Teacher
from matt_fast.model.weight_values import check_values
from matt_fast.support.checks import check_choice, checked
from matt_fast.support.own_state import own_state

DTYPES = {"auto": "auto", "no": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TextScore:
    """A model on a held-out text.

    Attributes:
        evaluation: bits per byte, bytes per token, and what was scored.
        interval: of bits per byte.
        ratio, ratio_interval: bits per byte over the first model's; None for the first.
    """

    evaluation: Evaluation
    interval: Interval | None
    ratio: float | None = None
    ratio_interval: Interval | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt, and what each model writes behind it."""

    prompt: str
    written: dict[str, str]


@dataclass
class Measured:
    """What `evaluate_models` found.

    Attributes:
        models: name -> where it lies; the first is compared with.
        texts: name of a text -> model -> its score.
        tasks: a row for each metric of each task.
        completions: one for each prompt.
        speed: model -> how fast it reads and writes.
    """

    models: dict[str, str]
    texts: dict[str, dict[str, TextScore]] = field(default_factory=dict)
    tasks: list[TaskScore] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    speed: dict[str, Speed] = field(default_factory=dict)


@checked
@own_state()
def evaluate_models(
    models: Mapping[str, str | Path],
    texts: Mapping[str, str | Path],
    *,
    tokenizer: str | None = None,
    pieces: int | None = None,
    piece_bytes: int | None = None,
    tasks: TaskOptions | None = None,
    prompts: Sequence[str] = (),
    speed: bool = False,
    precision: str = "auto",
    split: str = "train",
    text_field: str = "text",
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> Measured:
    """Measure models, one after the other; for their speed all of them are loaded together.

    Long because it documents every argument.

    Args:
        models: name -> folder or hub name; the first is the original, which the others are compared with.
        texts: name -> held-out text, see `read_documents`.
        tokenizer: another one than the model's own, of a single model.
        pieces, piece_bytes: of each text, see `evaluate`.
        tasks: of lm-evaluation-harness.
        prompts: completed by each model: the same number of bytes, some 40 tokens of the first model.
        speed: time reading and writing of the first text.
        precision: of the weights: auto (as stored), no (float32) or bf16.
        split, text_field, device, trust_remote_code, allow_pickle: as in `transfer`.
        on_stage, on_progress: as in `transfer`.

    Raises:
        ValueError: an argument does not fit; a masked model beside tasks, prompts or speed.
        ImportError: tasks without lm-evaluation-harness.
    """
    check_choice("precision", precision, DTYPES)
    chosen = None if tasks is None else Tasks(tasks)
    if chosen is not None:
        on_stage("tasks")
        chosen.load()  # an error now, not behind the texts
    on_stage("models")
    place, dtype = device or Accelerator().device, DTYPES[precision]
    hub = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    sources = {name: Teacher(model, **hub) for name, model in models.items()}
    what = {"tasks": tasks is not None, "prompts": bool(prompts), "speed": speed}
    _check_kinds(sources, [name for name, wanted in what.items() if wanted])
    documents = {name: read_documents(text, split=split, text_field=text_field) for name, text in texts.items()}
    spoken = passages(next(iter(documents.values()))) if speed else []
    for source in sources.values():
        check_values(source, check_weights(source), on_progress)
    found, scores, written, n_bytes = Measured({name: str(x) for name, x in models.items()}), {}, {}, 0
    loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
    for name, source in sources.items():
        on_stage(f"loading ({name})")
        model, its_tokenizer = source.load(dtype).to(place), source.load_tokenizer(tokenizer)
        options = {"piece_bytes": piece_bytes, "max_pieces": pieces, "masked": source.masked}
        for text, content in documents.items():
            on_stage(f"{text} ({name})")
            told = lambda done: on_progress("pieces", done, pieces)  # noqa: E731
            scored = evaluate(model, its_tokenizer, content, **options, on_piece=told)
            known = found.texts.setdefault(text, {})
            known[name] = _text_score(scored, next(iter(known.values())).evaluation if known else None)
        if prompts:
            on_stage(f"completions ({name})")
            n_bytes = n_bytes or completion_bytes(its_tokenizer, prompts)
            told = lambda done: on_progress("prompts", done, len(prompts))  # noqa: E731
            written[name] = complete(model, its_tokenizer, prompts, n_bytes, on_prompt=told)
        if chosen is not None:
            on_stage(f"tasks ({name})")
            scores[name] = chosen.run(model, its_tokenizer)
        if speed:
            loaded[name] = model, its_tokenizer
    found.completions = [
        Completion(prompt, {name: texts[index] for name, texts in written.items()})
        for index, prompt in enumerate(prompts)
    ]
    found.tasks = compare(scores) if scores else []
    if speed:
        on_stage("speed")
        found.speed = measure_speed(loaded, spoken, on_round=lambda done: on_progress("rounds", done, ROUNDS))
    return found


def _check_kinds(sources: Mapping[str, Teacher], wanted: Sequence[str]) -> None:
    """Raise a ValueError for a model without a head, a masked one that would have to write, or both kinds at once."""
    for source in sources.values():
        source.check_language_model("evaluate")
        if source.masked and wanted:
            raise ValueError(
                f"{wanted[0]}: wanted causal language models, which write text, got the masked one "
                f"{str(source.model)!r}; bits per byte (data) is what it can be measured by"
            )
    if len({source.masked for source in sources.values()}) > 1:
        raise ValueError("model: wanted all causal or all masked, whose figures do not compare, got both kinds")


def _text_score(scored: Evaluation, first: Evaluation | None) -> TextScore:
    if first is None:
        return TextScore(scored, bits_interval(scored))
    ratio = scored.bits_per_byte / first.bits_per_byte
    return TextScore(scored, bits_interval(scored), ratio, ratio_interval(scored, first))
