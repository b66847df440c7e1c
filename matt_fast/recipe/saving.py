"""A model with its new vocabulary as a folder that transformers loads, checked against the original."""

from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.initializers import Rows
from matt_fast.model.teacher import Teacher, only_errors
from matt_fast.model.weight_values import check_same_weights
from matt_fast.recipe import export
from matt_fast.recipe.licence_files import copy_licence
from matt_fast.recipe.processor_files import copy_processor
from matt_fast.recipe.special_ids import update_special_ids


def save_result(
    folder: Path,
    source: Teacher,
    model: PreTrainedModel,
    rows: Rows,
    vocabulary: VocabularyPair,
    changed: Collection[str] = (),
) -> list[str]:
    """Give a model new embeddings and write it with its tokenizer, configurations, processor and licence.

    Args:
        folder: to write into; there, and empty.
        source: where `model` came from.
        model: the original, in the dtype that it is stored in; changed in place.
        rows: whole tables of the new vocabulary.
        vocabulary: of the original and of the result.
        changed: names of parameters that were trained beside the rows.

    Returns:
        a line for each thing of the original that the result could not take over.

    Raises:
        ValueError: rows that are not finite in the model's dtype; or what was written is not the original's, outside
            the vocabulary and `changed`.
    """
    export.check_rows(rows, model.get_input_embeddings().weight.dtype, vocabulary)
    export.replace_vocabulary(model, rows)
    lost = update_special_ids(model, vocabulary)
    if (line := export.lost_chat_template(vocabulary.student, vocabulary.teacher)) is not None:
        lost.append(f"tokenizer: {line}")
    export.keep_chat_template(vocabulary.student, vocabulary.teacher)
    lost += export.repair_generation_config(model)
    with only_errors():
        model.save_pretrained(folder)
    lost += check_same_weights(source, folder, model, changed)
    vocabulary.student.save_pretrained(folder)
    lost += copy_processor(source.model, folder, vocabulary)
    return lost + copy_licence(source.model, folder, getattr(source.config, "_commit_hash", None))
