"""Attention influence between segments, |s[i, j]|, of a model with its own and with a new tokenizer (paper, §3.3)."""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import Token, VocabularyPair, show_token
from matt_fast.data.chunks import make_chunks, sides_of
from matt_fast.loss.documents import Document, find_documents
from matt_fast.loss.eager import segment_states
from matt_fast.model.attention import AttentionInputs
from matt_fast.model.capture import capture_attention
from matt_fast.model.embeddings import rows_of_any_number

MAX_TOKENS = 256  # of either side: states of one head are tokens × segments × head size


@dataclass(frozen=True)
class Influence:
    """How strongly each segment is drawn on by each that reads it.

    Attributes:
        labels: the segments' texts by the new tokenizer's tokens, `visible`.
        teacher: [m, m] float32, the norm of s[i, j] at the head, or the mean of the heads' norms; the row i is the
            segment that reads. Above the diagonal of a causal model it is 0.
        students: the same by name ("before", "after").
        distances: by name, [m, m]: the norm of the student's s[i, j] minus the teacher's, mean over the heads.
        layer: counted from 1.
        head: counted from 0; None for the mean over all.
        causal: whether segments see only those before them.
        left_out: segments of the text behind those shown.
    """

    labels: tuple[str, ...]
    teacher: torch.Tensor
    students: dict[str, torch.Tensor]
    distances: dict[str, torch.Tensor]
    layer: int
    head: int | None
    causal: bool
    left_out: int

    def mean_distance(self, name: str) -> float:
        """Mean over all pairs that see each other."""
        pairs = self.distances[name]
        count = len(pairs)
        return float(pairs.sum()) / (count * (count + 1) / 2 if self.causal else count * count)


def find_influence(
    teacher: PreTrainedModel,
    vocabulary: VocabularyPair,
    text: str,
    students: dict[str, tuple[PreTrainedModel, torch.Tensor]],
    layer: int,
    head: int | None = None,
) -> Influence:
    """Run a text through the lower layers of a model under both tokenizers and compare what attention moves.

    The text is cut into segments, and special tokens put around it, as in training; what does not fit into MAX_TOKENS
    tokens is left out.

    Args:
        teacher: the model, or its trunk.
        vocabulary: its own tokenizer and the new one.
        text: a text.
        students: by name a model and its input embedding, [student rows, hidden]; the model is run with these rows.
        layer: whose attention is looked at, counted from 1.
        head: counted from 0; the mean over all if None.

    Raises:
        ValueError: no such layer or head, no text, or attention that the AIM loss does not describe.
    """
    chunks = list(make_chunks([text], *sides_of(vocabulary, MAX_TOKENS), Counter()))
    if not chunks:
        raise ValueError(f"text: wanted text with segments, got {text[:40]!r}")
    first = chunks[0]
    ids = {"teacher": first.teacher_ids, "student": first.student_ids}
    ids = {name: torch.as_tensor(x)[None] for name, x in ids.items()}
    owners = [torch.as_tensor(x)[None] for x in (first.teacher_segments, first.student_segments)]
    (document,) = find_documents(*owners)
    with torch.no_grad():
        given = capture_attention(teacher, layer - 1, input_ids=ids["teacher"])
        heads = given.query.shape[1]
        if head is not None and not 0 <= head < heads:
            raise ValueError(f"head: wanted 0 to {heads - 1} at this layer, or mean; got {head}")
        captured = {}
        for name, (model, rows) in students.items():
            if len(rows) < vocabulary.rows:
                raise ValueError(
                    f"students: wanted {vocabulary.rows} rows for the new tokenizer {name}, got {len(rows)}"
                )
            embedding = model.get_input_embeddings()
            weight = {"weight": rows.to(embedding.weight)}
            with rows_of_any_number(embedding):
                inputs = torch.func.functional_call(embedding, weight, (ids["student"],))
            captured[name] = capture_attention(model, layer - 1, inputs_embeds=inputs)
        return _compare(given, captured, document, vocabulary, first, [head] if head is not None else range(heads), {
            "layer": layer,
            "head": head,
            "left_out": sum(int(x.teacher_segments.max()) + 1 for x in chunks[1:]),
        })  # fmt: skip


def _compare(teacher, students, document: Document, vocabulary, chunk, heads, about) -> Influence:
    count = document.segment_count
    strength = {name: torch.zeros(count, count) for name in ("teacher", *students)}
    distance = {name: torch.zeros(count, count) for name in students}
    for head in heads:
        theirs = _states(teacher, document, "teacher", head)
        strength["teacher"] += theirs.norm(dim=-1) / len(heads)
        for name, inputs in students.items():
            ours = _states(inputs, document, "student", head)
            strength[name] += ours.norm(dim=-1) / len(heads)
            distance[name] += (ours - theirs).norm(dim=-1) / len(heads)
    written = [b""] * count
    for token, segment in zip(chunk.student_ids.tolist(), chunk.student_segments.tolist(), strict=True):
        if segment >= 0:
            written[segment] += vocabulary.tokens[token].bytes
    labels = [show_token(Token("text", x)) for x in written]
    reference = strength.pop("teacher")
    return Influence(tuple(labels), reference, strength, distance, causal=teacher.causal, **about)


def _states(inputs: AttentionInputs, document: Document, side: str, head: int) -> torch.Tensor:
    """s[i, j] of one head, [m, m, d] float32."""
    group = head * inputs.key.shape[1] // inputs.query.shape[1]
    one = inputs.query[:, head : head + 1], inputs.key[:, group : group + 1], inputs.value[:, group : group + 1]
    return segment_states(
        tuple(x.float() for x in one),
        0,
        getattr(document, side),
        "aim",
        scale=inputs.scale,
        sliding_window=inputs.sliding_window,
        softcap=inputs.softcap,
        causal=inputs.causal,
    )[0]
