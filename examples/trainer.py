"""AIM beside the language modelling loss in transformers' Trainer; only the student's input embeddings are trained.

AIMTrainer(student, TrainingArguments(..., remove_unused_columns=False), AlignedCollator(teacher_tokenizer, tokenizer),
           train_dataset=rows_with_text, teacher=teacher, layer=10, aim_weight=1e3).train()
Look at both losses before you choose aim_weight: their sizes have nothing to do with each other.
"""

import torch
from transformers import Trainer

from matt_fast import aim_loss, capture_attention


class AIMTrainer(Trainer):
    def __init__(self, model, *args, teacher, layer, aim_weight, **options):
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_().padding_idx = None  # it is an id of the old tokenizer
        super().__init__(model, *args, **options)
        self.teacher, self.layer, self.aim_weight = teacher.to(self.args.device), layer, aim_weight
        self.model_accepts_loss_kwargs = False  # the loss is a mean over each batch: Trainer averages accumulated ones

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, {**inputs["student"], "labels": inputs["labels"]}, True)
        with torch.no_grad():
            teacher = capture_attention(self.teacher, self.layer, **inputs["teacher"])
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        student = capture_attention(inner, self.layer, **inputs["student"])
        loss = loss + self.aim_weight * aim_loss(
            teacher.states,
            student.states,
            inputs["teacher_segments"],
            inputs["student_segments"],
            teacher_documents=teacher.documents,
            student_documents=student.documents,
            **student.options,
        )
        return (loss, outputs) if return_outputs else loss
