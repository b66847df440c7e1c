"""The result as a folder that transformers loads: model, tokenizer, configuration, provenance and model card."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import InitReport, Rows

ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def replace_vocabulary(model: PreTrainedModel, rows: Rows) -> None:
    """Give `model` new embeddings, in place; `vocab_size` of its configuration follows."""
    model.resize_token_embeddings(len(rows.input), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows.input)
        if rows.output is not None:
            model.get_output_embeddings().weight.copy_(rows.output)
        if rows.output_bias is not None:
            model.get_output_embeddings().bias.copy_(rows.output_bias)


def update_special_ids(model: PreTrainedModel, vocabulary: VocabularyPair) -> None:
    """Translate the token ids in the model's configuration and generation configuration to the new vocabulary.

    The new tokenizer's own bos, eos and pad ids come first. Further ids of a list (ends of text in a generation
    configuration) become those of the same student tokens; ids without a student token are dropped.
    """
    student_of: dict[int, int] = {}
    for student_id, match in sorted(vocabulary.matches.items(), key=lambda item: item[1].how != "bytes"):
        student_of.setdefault(match.teacher_id, student_id)

    def translate(ids: list[int]) -> list[int]:
        return [student_of[i] for i in ids if i in student_of]

    generation = [config] if (config := getattr(model, "generation_config", None)) else []  # a decoder has one
    for config in (model.config, model.config.get_text_config(decoder=True), *generation):
        for name in ID_FIELDS:
            if not hasattr(config, name):
                continue
            old, own = getattr(config, name, None), getattr(vocabulary.student, name)
            ids = [] if own is None else [own]
            if isinstance(old, list):
                setattr(config, name, list(dict.fromkeys(ids + translate(old))))
            else:
                setattr(config, name, next(iter(ids or translate([] if old is None else [old])), None))
        for name in ID_LISTS:
            if getattr(config, name, None):
                setattr(config, name, translate(getattr(config, name)))


def keep_chat_template(tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Give `tokenizer` the teacher's chat template if it has none and knows every special token the template names."""
    template = teacher.chat_template
    if tokenizer.chat_template or not isinstance(template, str):
        return
    named = [token for token in teacher.all_special_tokens if token in template]
    if all(token in tokenizer.get_vocab() for token in named):
        tokenizer.chat_template = template


def write_provenance(
    path: Path,
    vocabulary: VocabularyPair,
    init: str,
    report: InitReport,
    trained: Sequence[bool],
    seen: Sequence[int],
) -> None:
    """Write one JSON line per row: id, token, how it started, from which teacher ids, trained or frozen, times seen.

    A new token's start is `init` where the method made its row, else what it was left to.
    """
    entries = {i: text for text, i in vocabulary.student.get_vocab().items()}
    with path.open("w", encoding="utf-8") as file:
        for i in range(vocabulary.rows):
            match = vocabulary.matches.get(i)
            left_to = "its sub-tokens" if i in vocabulary.subtokens else "mean of all rows"
            start = init if i in report.made else left_to if i in vocabulary.tokens else "no token"
            record = {
                "id": i,
                "token": entries.get(i),
                "start": start if match is None else f"copied ({match.how})",
                "teacher_ids": vocabulary.subtokens.get(i, []) if match is None else [match.teacher_id],
                "trained": trained[i],
                "seen": seen[i],
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
