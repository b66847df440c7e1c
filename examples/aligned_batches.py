"""A data collator for two tokenizers: rows with a "text" become one right-padded batch with aligned segment ids.

Each text is kept whole: where it is too long for a model, cut it before, not with `truncation`, which takes different
parts of it on the two sides.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

from matt_fast import align_segments_batch


@dataclass
class AlignedCollator:
    teacher_tokenizer: PreTrainedTokenizerBase
    student_tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict]) -> dict:
        texts = [row["text"] for row in rows]
        tokenizers = self.teacher_tokenizer, self.student_tokenizer
        teacher, student = (x(texts, return_offsets_mapping=True, return_special_tokens_mask=True) for x in tokenizers)
        offsets = teacher["offset_mapping"], student["offset_mapping"]
        special = teacher["special_tokens_mask"], student["special_tokens_mask"]
        teacher_segments, student_segments = align_segments_batch(*offsets, *special)
        return {
            "teacher": BatchEncoding({name: pad(teacher[name], 0) for name in ("input_ids", "attention_mask")}),
            "student": BatchEncoding({name: pad(student[name], 0) for name in ("input_ids", "attention_mask")}),
            "teacher_segments": pad(teacher_segments, -100),
            "student_segments": pad(student_segments, -100),
            "labels": pad(student["input_ids"], -100),
        }


def pad(rows, value: int) -> torch.Tensor:
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)
