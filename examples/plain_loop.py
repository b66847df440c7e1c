"""AIM in a plain PyTorch loop: the student's attention learns to move what the teacher's does, by its embeddings alone.

`batches`: DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=AlignedCollator(teacher_tokenizer, tokenizer)).
"""

import torch

from matt_fast import aim_loss, capture_attention


def train(teacher, student, batches, layer, lr=1e-3):
    """Train the student's input embeddings, in place; returns the loss of each step."""
    student.requires_grad_(False)
    embedding = student.get_input_embeddings().requires_grad_()
    embedding.padding_idx = None  # an id of the old tokenizer: torch would drop the gradient of this row
    optimizer = torch.optim.AdamW([embedding.weight], lr=lr, weight_decay=0)  # decay would move rows of absent tokens
    losses = []
    for batch in batches:
        with torch.no_grad():
            target = capture_attention(teacher, layer, **batch["teacher"].to(teacher.device))
        states = capture_attention(student, layer, **batch["student"].to(student.device))
        loss = aim_loss(
            target.states,
            states.states,
            batch["teacher_segments"],
            batch["student_segments"],
            teacher_documents=target.documents,
            student_documents=states.documents,
            **states.options,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
