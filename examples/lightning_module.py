"""AIM in a Lightning module; only the student's input embeddings are trained.

lightning.Trainer(...).fit(AIMModule(teacher, student, layer=10), DataLoader(..., collate_fn=AlignedCollator(...)))
"""

import lightning
import torch

from matt_fast import aim_loss, capture_attention


class AIMModule(lightning.LightningModule):
    def __init__(self, teacher, student, layer, lr=1e-3):
        super().__init__()
        self.teacher, self.student, self.layer, self.lr = teacher.requires_grad_(False), student, layer, lr
        student.requires_grad_(False)
        student.get_input_embeddings().requires_grad_().padding_idx = None  # it is an id of the old tokenizer

    def training_step(self, batch, batch_index):
        with torch.no_grad():
            teacher = capture_attention(self.teacher, self.layer, **batch["teacher"])
        student = capture_attention(self.student, self.layer, **batch["student"])
        loss = aim_loss(
            teacher.states,
            student.states,
            batch["teacher_segments"],
            batch["student_segments"],
            teacher_documents=teacher.documents,
            student_documents=student.documents,
            **student.options,
        )
        self.log("aim_loss", loss)
        return loss

    def configure_optimizers(self):  # weight decay would move rows of absent tokens
        return torch.optim.AdamW(self.student.get_input_embeddings().parameters(), lr=self.lr, weight_decay=0)
