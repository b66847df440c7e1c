"""What can be known before training is checked before it, and before weights are loaded or rows initialised."""

import copy
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from matt_fast.alignment.vocabulary import VocabularyPair, special_affixes
from matt_fast.evaluation.bits_per_byte import (
    MASKED_PIECE_BYTES,
    PIECE_BYTES,
    check_positions,
    check_scorable,
    cut_pieces,
    specials_around,
)
from matt_fast.model.checkpoint_files import configured_dtype
from matt_fast.model.packed import positions_padding
from matt_fast.model.teacher import Teacher, only_errors
from matt_fast.model.tokenizer_files import first_difference
from matt_fast.recipe.export import repair_generation
from matt_fast.recipe.processor_files import copy_processor
from matt_fast.recipe.special_ids import translate_ids
from matt_fast.support.files import raise_if_full
from matt_fast.support.texts import bounded_pieces
from matt_fast.support.units import size_in_words
from matt_fast.training.checkpoints import CHECKPOINTS_KEPT
from matt_fast.training.options import HealingOptions

CHECKPOINT_TABLES = 3  # float32 each: rows and two moments; of output rows what waits comes on top
LOOKED_AT = 1 << 22  # characters of the data, for a new token
LORA = 0.1  # of the layers' numbers, at most, in adapters of a usual rank
MARGIN = 1.1  # tokenizer, card, logs


def check_room(output: str | Path, needed: int) -> None:
    """Raise an OSError unless the file system of `output` has so many bytes free."""
    path = Path(output).absolute()
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"output: wanted {size_in_words(needed)} of room on the disk for checkpoints and the result, got "
            f"{size_in_words(free)} free in {str(place)!r}"
        )


def estimate_bytes(
    teacher: Teacher,
    rows: int,
    trainable: int,
    healing: HealingOptions | None = None,
    *,
    predicts: bool = False,
    validates: bool = False,
) -> int:
    """Bytes on the disk that a transfer takes at most: the result, checkpoints, the rows as they start and end.

    Args:
        teacher: the model, of which the configuration is read.
        rows: of the new vocabulary.
        trainable: rows that are trained, in each table.
        healing: of layers, with checkpoints of their own.
        predicts: whether output rows are trained before healing.
        validates: whether the best weights are kept, too.
    """
    dtype = configured_dtype(teacher) or torch.float32
    outline = teacher.outline(dtype)
    head = outline.get_output_embeddings()
    tables = {id(x.weight): x.weight for x in (outline.get_input_embeddings(), head) if x is not None}.values()
    widths = sum(table.shape[1] for table in tables)
    others = sum(x.numel() for x in outline.parameters()) - sum(table.numel() for table in tables)
    result = (others + rows * widths) * dtype.itemsize
    copies = (CHECKPOINTS_KEPT + 1) * CHECKPOINT_TABLES  # one checkpoint more while it is written
    copies += CHECKPOINTS_KEPT + 2 if validates else 0  # the best of each checkpoint and now, and one that is written
    checkpoints = of_rows = copies * trainable * widths * 4
    waiting = (CHECKPOINTS_KEPT + 1) * trainable * (0 if head is None else head.weight.shape[1]) * 4
    checkpoints += waiting if predicts else 0
    if healing is not None:
        share = min(1.0, {"lora": LORA, "outer": 2 * healing.outer_layers / teacher.depth, "full": 1.0}[healing.method])
        checkpoints += (copies + 1) * share * others * 4 + of_rows + waiting  # and the layers behind it
    return round(MARGIN * (result + checkpoints + 2 * rows * widths * 4))


def rehearse_saving(teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Save and load again all of the result but its weights, in a temporary folder; returns what will be repaired.

    Raises:
        ValueError: the configuration, generation configuration or tokenizer cannot be saved, or not be loaded again, or
            the tokenizer is another one then.
    """
    messages: list[str] = []
    with tempfile.TemporaryDirectory(prefix="matt-fast-") as folder, only_errors():
        _rehearse("model: its configuration", lambda: teacher.config.save_pretrained(folder))
        _rehearse("model: its configuration", lambda: AutoConfig.from_pretrained(folder, **teacher.options))
        generation = _rehearse("model: its generation configuration", lambda: _generation_config(teacher))
        if generation is not None:
            messages = repair_generation(generation)
            _rehearse("model: its generation configuration", lambda: generation.save_pretrained(folder))
            _rehearse("model: its generation configuration", lambda: GenerationConfig.from_pretrained(folder))
        _rehearse("tokenizer: it", lambda: tokenizer.save_pretrained(folder))
        again = _rehearse("tokenizer: it", lambda: AutoTokenizer.from_pretrained(folder, **teacher.options))
        before, after = tokenizer.get_vocab(), again.get_vocab()
        line = first_difference(tokenizer, again) if before == after else None
    if before != after:
        token = sorted(before.items() ^ after.items())[0][0]
        roles = [role for role, x in again.special_tokens_map.items() if x == token and token not in before]
        name = type(again).__name__
        why = f". {name}, which transformers takes for this model, adds it as its {' and '.join(roles)}: give the "
        raise ValueError(
            "tokenizer: wanted one that is the same when it was saved and loaded again, got another vocabulary: "
            f"{token!r} is {before.get(token)} before and {after.get(token)} after"
            + (f"{why}tokenizer tokens of its own for that" if roles else "")
        )
    if line is not None:
        taken = type(again).__name__
        advice = (
            f"{taken} does not keep what it was given. "
            "PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer) does"
            if type(again) is type(tokenizer)
            else f"transformers takes {taken} beside a model of type {teacher.config.model_type!r}, which cuts text by "
            "rules of its own; a tokenizer that was made of the model's own (extended without join_marks, or by "
            "train_new_from_iterator) has them"
        )
        raise ValueError(
            "tokenizer: wanted one that is the same when it was saved and loaded again, got other tokens then, of "
            f"{line!r} for example: {advice}"
        )
    return messages


def rehearse_ids(teacher: Teacher, vocabulary: VocabularyPair) -> list[str]:
    """Translate the token ids of the configurations, save them and load them again; returns what is dropped.

    Raises:
        ValueError: they cannot be saved with the new ids, or not be loaded again; or positions would begin elsewhere.
    """
    what = "model: its configuration with the new vocabulary"
    before = positions_padding(teacher.outline(torch.float32))
    with tempfile.TemporaryDirectory(prefix="matt-fast-") as folder, only_errors():
        config = copy.deepcopy(teacher.config)
        messages = _rehearse(what, lambda: translate_ids(config, vocabulary))
        config.get_text_config(decoder=True).vocab_size = vocabulary.rows
        made = _rehearse(what, lambda: teacher.outline(torch.float32, config=config))
        if (after := positions_padding(made)) != before:
            raise ValueError(
                f"tokenizer: wanted a padding token with the id {', '.join(map(str, before))}, as the model has, whose "
                f"positions depend on it; got {', '.join(map(str, after)) or 'none'}"
            )
        _rehearse(what, lambda: config.save_pretrained(folder))
        _rehearse(what, lambda: AutoConfig.from_pretrained(folder, **teacher.options))
        generation = _generation_config(teacher)
        if generation is not None:
            messages += _rehearse(what, lambda: translate_ids(generation, vocabulary))
            repair_generation(generation)
            _rehearse(what, lambda: generation.save_pretrained(folder))
    return messages + copy_processor(teacher.model, None, vocabulary)


def check_tokenizers_differ(student: PreTrainedTokenizerBase, *teachers: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if all have the same vocabulary with the same merges: there is nothing to transfer."""
    if any(student.get_vocab() != teacher.get_vocab() for teacher in teachers):
        return
    models = [json.loads(x.backend_tokenizer.to_str())["model"] for x in (student, *teachers)]
    if all(model == models[0] for model in models):
        raise ValueError(
            f"tokenizer: wanted another than the model's own, got the same vocabulary of {len(student)} tokens with "
            "the same merges: there is nothing to transfer. A model that a transfer made trains on with "
            "teacher=ORIGINAL beside its own tokenizer"
        )


def no_new_tokens(vocabulary: VocabularyPair) -> str | None:
    """A line that says so if no token is new, as in a vocabulary that is a part of the model's; None otherwise."""
    if vocabulary.new:
        return None
    return (
        f"tokenizer: the model has all {len(vocabulary.tokens)} tokens: their rows are taken over, and nothing is "
        "trained. Without freeze_shared their rows are"
    )


def missing_new_tokens(documents: Iterable[str], vocabulary: VocabularyPair) -> str | None:
    """A line that says so if none of the new tokens occurs where `documents` begin; None as soon as one is found."""
    new = set(vocabulary.new)
    if not new.isdisjoint(itertools.chain(*special_affixes(vocabulary.student))):
        return None
    characters = 0
    for piece in bounded_pieces(documents, LOOKED_AT >> 8):
        if not new.isdisjoint(vocabulary.student(piece, add_special_tokens=False)["input_ids"]):
            return None
        characters += len(piece)
        if characters >= LOOKED_AT:
            break
    return (
        f"data: none of the {len(new):,} new tokens occurs in its first {characters:,} characters; steps without one "
        "train nothing"
    )


def check_max_length(max_length: int, limit: int | None) -> None:
    """Raise a ValueError if a training chunk may have more tokens than `position_limit` of the model."""
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length: wanted at most the model's {limit} positions, got {max_length}")


def check_pieces(
    held_out: Iterable[str | None],
    tokenizers: Iterable[PreTrainedTokenizerBase],
    limit: int | None,
    *,
    masked: bool,
    max_pieces: int | None,
    argument: str = "eval_data",
) -> None:
    """Read the pieces of text that `evaluate` will score, and look whether the model has positions for their tokens.

    Raises:
        ValueError: there is no text, a piece has more tokens, by either tokenizer, than `limit`, or a tokenizer lacks
            the special token that scoring needs.
    """
    size = MASKED_PIECE_BYTES if masked else PIECE_BYTES
    pieces = list(itertools.islice(cut_pieces(held_out, size), max_pieces))
    if not pieces:
        raise ValueError(f"{argument}: wanted text to score, got none")
    for tokenizer in tokenizers:
        check_scorable(tokenizer, masked)
        around = specials_around(tokenizer, masked)
        for piece in pieces:
            tokens = around + len(tokenizer(piece, add_special_tokens=False)["input_ids"])
            check_positions(piece, tokens, limit, argument)


def _rehearse(what: str, work):
    try:
        return work()
    except Exception as error:  # of many kinds, and each would come after the training
        raise_if_full(error, tempfile.gettempdir())
        raise ValueError(f"{what} cannot be saved and loaded again: {error}") from error


def _generation_config(teacher: Teacher) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(teacher.model)
    except OSError:
        if Path(teacher.model, GENERATION_CONFIG_NAME).exists():
            raise
        return None  # it has none
