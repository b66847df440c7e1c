"""Packed rows against their documents one by one, alone and without padding."""

import itertools
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    OPTConfig,
    Qwen3Config,
    XLMRobertaConfig,
)

from matt_fast import TrainingOptions
from matt_fast.alignment.continuations import Continuations, Spellings
from matt_fast.data.batches import collate
from matt_fast.data.continuations import with_continuations
from matt_fast.data.packing import Chunk, pack
from matt_fast.model.capture import capture
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.head import Head, logit_rule
from matt_fast.training.loop import freeze
from matt_fast.training.objectives import losses, plan_ahead
from matt_fast.training.options import OBJECTIVES
from matt_fast.training.sides import Student, Target

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral": MistralConfig(**GROUPED, sliding_window=6),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=5, layer_types=LOCAL_GLOBAL),
    "gpt_neox": GPTNeoXConfig(**SIZES, num_attention_heads=4, rotary_pct=0.5, max_position_embeddings=64),
    "opt": OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "modernbert": ModernBertConfig(
        **SIZES, num_attention_heads=4, global_attn_every_n_layers=2, local_attention=8, pad_token_id=0
    ),
    "xlm_roberta": XLMRobertaConfig(**SIZES, num_attention_heads=4, max_position_embeddings=80, pad_token_id=1),
}
ENCODERS = ("modernbert", "xlm_roberta")
FLOAT32_NORMS = ("llama", "qwen3", "mistral", "gemma3")  # whatever the model's dtype
LAYERS = 3  # the last one has a window where there are any
ENCODER_OBJECTIVES = ("aim", "aim_star", "aim-all-layers", "token-distillation")


def make_chunk(generator, segments: int, prefix=(1, 0)) -> Chunk:
    """Random tokens, 1 to 3 to a segment; `prefix` special tokens before them and one after them on the second side."""
    ids, segment_ids = [], []
    for side in range(2):
        sizes = generator.integers(1, 4, segments)
        parts = np.repeat(np.arange(segments), sizes)
        segment_ids.append(np.pad(parts, (prefix[side], side), constant_values=-100))
        ids.append(generator.integers(2, 61, len(segment_ids[-1])))
    return Chunk(*ids, *segment_ids)


def make_rows() -> list[list[Chunk]]:
    generator = np.random.default_rng(0)
    rows = [
        [(1, (1, 0)), (7, (0, 0)), (3, (2, 1))],
        [(9, (0, 1))],
        [(1, (0, 0)), (1, (0, 0)), (4, (1, 0)), (2, (0, 2))],
    ]
    return [[make_chunk(generator, *sizes) for sizes in row] for row in rows]


def continuations_in(rows: list[list[Chunk]]) -> Continuations:
    """Tokens of either side that the other one spells as it happens to in these rows, and single ones."""
    spelled = {}, {}
    for chunk in (chunk for row in rows for chunk in row):
        for segment in range(1, int(chunk.student_segments.max()) + 1):
            teacher = chunk.teacher_ids[np.flatnonzero(chunk.teacher_segments == segment)[0] :].tolist()
            student = chunk.student_ids[np.flatnonzero(chunk.student_segments == segment)[0] :].tolist()
            spelled[0].setdefault(student[0], teacher[:2])
            spelled[1].setdefault(teacher[0], student[:3])
    of_student = {i: [i] for i in range(61)} | spelled[0]
    return Continuations(Spellings.of(of_student, 61), Spellings.of(spelled[1], 61))


class Setting:
    def __init__(self, name: str, dtype: torch.dtype):
        torch.manual_seed(0)
        self.causal = name not in ENCODERS
        loader = AutoModelForCausalLM if self.causal else AutoModelForMaskedLM
        self.model = loader.from_config(deepcopy(CONFIGS[name])).to(dtype)
        for parameter in self.model.parameters():
            parameter.data.normal_(std=0.2)
        freeze(self.model)
        weight = self.model.get_input_embeddings().weight
        self.table = EmbeddingTable(weight, torch.full((61,), -1), torch.randn(61, 32))
        self.table.trainable = self.table.trainable.to(dtype)  # as exact as the model
        self.head = self.target = None
        if self.causal:
            head = self.model.get_output_embeddings().weight.clone()
            self.head = Head(head, **logit_rule(self.model.float()))
            classes = torch.arange(61) % 20
            self.target = Target(Head(head, **logit_rule(self.model)), classes, classes.flip(0), 20)
            self.model.to(dtype)

    def losses(self, batch, objective, **options):
        """Each objective's loss, and its gradient with respect to all rows."""
        chosen = TrainingOptions(objective=objective, **options)
        student = Student(self.table, None, self.head, self.target)
        rows = student.rows(torch.arange(61))
        if objective == "segment-kl":
            batch = with_continuations(continuations_in(make_rows()), batch)
        parts = losses(self.model, self.model, student, rows, batch, LAYERS, chosen, causal=self.causal)
        (gradient,) = torch.autograd.grad(parts[objective], rows.leaves)
        return parts[objective].detach(), gradient

    def one_by_one(self, chunks, objective, **options):
        """The mean over what each chunk alone has to average, as the definition of the loss on all of them."""
        total, gradients, count = 0.0, 0.0, 0
        for chunk in chunks:
            segments = int(chunk.student_segments.max()) + 1
            pairs = segments * (segments + 1) // 2 if self.causal else segments**2
            terms = {
                "aim": pairs,
                "aim-all-layers": pairs,
                "ntp": len(chunk.student_ids) - 1,
                "alm": segments - (0 in (chunk.teacher_segments[0], chunk.student_segments[0])),
                "boundary-head": segments - (chunk.teacher_segments[0] == 0),
            }.get(objective, segments)
            if options.get("reduction") == "documents":
                terms = 1
            if not terms:
                continue
            loss, gradient = self.losses(collate([[chunk]], Counter()), objective, **options)
            total, gradients, count = total + terms * loss, gradients + terms * gradient, count + terms
        return total / count, gradients / count


def compare(name, objective, *, tolerance, dtype=torch.float64, **options):
    setting, rows = Setting(name, dtype), make_rows()
    batch = collate(rows, Counter())
    assert batch.packed
    ours = setting.losses(batch, objective, **options)
    theirs = setting.one_by_one([chunk for row in rows for chunk in row], objective, **options)
    assert theirs[0] > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize(
    ("name", "objective"),
    [(name, x) for name in CONFIGS for x in (ENCODER_OBJECTIVES if name in ENCODERS else OBJECTIVES)],
)
def test_packed_rows_equal_their_documents_one_by_one(name, objective):
    tolerance = 1e-5 if name in FLOAT32_NORMS else 1e-9
    compare(name, objective, tolerance=tolerance, **({"backend": "torch"} if "aim" in objective else {}))


@pytest.mark.parametrize("metric", ["mse", "cosine"])
@pytest.mark.parametrize("reduction", ["pairs", "documents"])
@pytest.mark.parametrize("name", ["mistral", "modernbert"])
def test_so_do_all_forms_of_the_loss(name, reduction, metric):
    chosen = {"reduction": reduction, "metric": metric, "backend": "eager", "attn_implementation": "eager"}
    compare(name, "aim", tolerance=1e-5, **chosen)  # eager attention has its softmax in float32


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("llama", "aim"),
        ("gemma3", "aim_star"),
        ("mistral", "ntp"),
        ("gpt_neox", "token-distillation"),
        ("modernbert", "aim"),
        ("xlm_roberta", "token-distillation"),
    ],
)
def test_checkpointing_changes_no_gradient_of_packed_rows(name, objective, attn_implementation):
    setting, batch = Setting(name, torch.float32), collate(make_rows(), Counter())
    chosen = {"backend": "torch", "attn_implementation": attn_implementation}
    found = [setting.losses(batch, objective, checkpointing=checkpointing, **chosen) for checkpointing in (False, True)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert found[0][1].abs().sum() > 0


@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert"])
@pytest.mark.parametrize("objective", ["aim", "aim_star"])
def test_so_do_the_kernels(name, objective):
    compare(name, objective, tolerance=1e-4, dtype=torch.float32, backend="triton")


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *itertools.product(("llama", "mistral", "gemma3"), ("aim", "aim_star", "aim-all-layers")),
        ("mistral", "aim+ntp"),
        ("llama", "token-distillation"),
    ],
)
def test_the_kernels_tiles_are_planned_ahead_of_the_step(name, objective, monkeypatch):
    setting = Setting(name, torch.float32)
    chosen = TrainingOptions(objective=objective, backend="triton")
    batch = collate(make_rows(), Counter())
    ready = plan_ahead(setting.model, LAYERS, chosen)(batch)
    windows = {"llama": {None}, "mistral": {6}, "gemma3": {5, None} if objective == "aim-all-layers" else {5}}[name]
    variant = "aim_star" if objective == "aim_star" else "aim"
    assert set(ready.plans) == (set() if objective == "token-distillation" else {(variant, w) for w in windows})
    student = Student(setting.table, None, setting.head, setting.target)
    rows = student.rows(torch.arange(61))
    expected = losses(setting.model, setting.model, student, rows, batch, LAYERS, chosen)
    monkeypatch.setattr("matt_kernels.aim_plan", None)  # nothing is planned in the step
    got = losses(setting.model, setting.model, student, rows, ready, LAYERS, chosen)
    assert all(torch.equal(got[x], expected[x]) for x in expected)
    torch_engine = TrainingOptions(objective=objective, backend="torch")
    assert plan_ahead(setting.model, LAYERS, torch_engine)(batch).plans == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_one_document_says_reaches_no_other(name):
    setting = Setting(name, torch.float32)
    batch = collate(make_rows(), Counter())
    before = capture(setting.model, hidden=2, input_ids=batch.student_ids, documents=batch.student_documents).hidden
    for row in (0, 2):
        document = int(batch.student_documents[row].max()) - 1
        inside = torch.zeros_like(batch.student_ids, dtype=torch.bool)
        inside[row] = batch.student_documents[row] == document
        other = torch.where(inside, (batch.student_ids + 7) % 61, batch.student_ids)
        after = capture(setting.model, hidden=2, input_ids=other, documents=batch.student_documents).hidden
        assert torch.equal(before[~inside], after[~inside])
        assert not torch.isclose(before[inside], after[inside]).all(-1).any()


def test_positions_that_start_again_say_the_same_as_documents():
    model = Setting("qwen3", torch.float32).model
    batch = collate(make_rows(), Counter())
    documents = batch.student_documents.clamp_min(0)  # no padding: the last row is the longest
    row = documents[2:]
    positions = torch.cat([torch.arange(n) for n in torch.unique(row, return_counts=True)[1].tolist()])[None]
    ids = batch.student_ids[2:]
    ours = capture(model, attention=[1], input_ids=ids, position_ids=positions).attention[1]
    theirs = capture(model, attention=[1], input_ids=ids, documents=row).attention[1]
    assert torch.equal(ours.query, theirs.query)
    assert torch.equal(ours.documents, theirs.documents)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=40),
    st.integers(1, 5),
)
def test_packing_loses_nothing_and_keeps_to_both_limits(sizes, open_rows):
    chunks = [Chunk(*(np.full(n, i) for n in (*size, *size))) for i, size in enumerate(sizes)]
    rows = list(pack(iter(chunks), (12, 9), open_rows))
    for row in rows:
        assert sum(chunk.lengths for chunk in row)[0] <= 12
        assert sum(chunk.lengths for chunk in row)[1] <= 9
    assert sorted(int(chunk.teacher_ids[0]) for row in rows for chunk in row) == list(range(len(sizes)))
    if len(rows) <= open_rows:  # all stayed open: none of a later row's chunks had room in an earlier one
        for i, row in enumerate(rows):
            for chunk in (chunk for later in rows[i + 1 :] for chunk in later):
                before = [x for x in row if x.teacher_ids[0] < chunk.teacher_ids[0]]
                assert (sum(x.lengths for x in [*before, chunk]) > (12, 9)).any()


def test_a_packed_batch_numbers_documents_and_looks_inside_them_only():
    rows = make_rows()
    batch = collate(rows, Counter(), multiple_of=8)
    width = batch.student_ids.shape[1]
    assert width % 8 == batch.teacher_ids.shape[1] % 8 == 0
    ends, before, first, predicting = [], [], [], []
    for i, row in enumerate(rows):
        start, base = [0, 0], 0
        for number, chunk in enumerate(row):
            for side, name in enumerate(("teacher", "student")):
                ids, segments = getattr(chunk, f"{name}_ids"), getattr(chunk, f"{name}_segments")
                part = slice(start[side], start[side] + len(ids))
                assert getattr(batch, f"{name}_ids")[i, part].tolist() == ids.tolist()
                assert set(getattr(batch, f"{name}_documents")[i, part].tolist()) == {number}
                found = getattr(batch, f"{name}_segments")[i, part].tolist()
                assert found == [x + base if x >= 0 else -100 for x in segments.tolist()]
            student, teacher = chunk.student_segments.tolist(), chunk.teacher_segments.tolist()
            for segment in range(max(student) + 1):
                ends.append(i * width + start[1] + max(t for t, x in enumerate(student) if x == segment))
                if teacher.index(segment):
                    before.append(i * batch.teacher_ids.shape[1] + start[0] + teacher.index(segment) - 1)
                    first.append(i * width + start[1] + student.index(segment))
            predicting += range(i * width + start[1], i * width + start[1] + len(student) - 1)
            start = [start[0] + len(teacher), start[1] + len(student)]
            base += max(student) + 1
        assert (batch.student_documents[i, start[1] :] == -1).all()
        assert (batch.student_segments[i, start[1] :] == -100).all()
    assert batch.places.student_ends.tolist() == ends
    assert batch.places.teacher_before.tolist() == before
    assert batch.places.student_first.tolist() == first
    assert batch.places.predicting.tolist() == predicting
    tokens = [
        sum(len(chunk.student_ids) for row in rows for chunk in row),
        sum(len(c.teacher_ids) for r in rows for c in r),
    ]
    assert batch.tokens == tokens[0]
    assert batch.padding == (3 * width + batch.teacher_ids.numel() - sum(tokens), 3 * width + batch.teacher_ids.numel())
    assert batch.distinct_ids.tolist() == sorted({int(i) for row in rows for c in row for i in c.student_ids})


def test_what_does_not_fit_packing_is_named():
    model = Setting("llama", torch.float32).model
    ids, documents = torch.ones(1, 4, dtype=torch.int64), torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="documents: wanted no attention_mask beside it, got both"):
        capture(model, hidden=1, input_ids=ids, documents=documents, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"documents: wanted shape \[B, n\] = \(1, 4\), got \(1, 3\)"):
        capture(model, hidden=1, input_ids=ids, documents=documents[:, :3])
    for packed in ({"documents": documents}, {"position_ids": torch.tensor([[0, 1, 0, 1]])}):
        with pytest.raises(ValueError, match="documents and compiled: wanted one of them, got both"):
            capture(model, hidden=1, input_ids=ids, compiled=True, **packed)
    with pytest.raises(ValueError, match="packing and compile: wanted one of them, got both"):
        TrainingOptions(packing=True, compile=True)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="documents: wanted a model without gradient checkpointing of its own"):
        capture(model, hidden=1, input_ids=ids, documents=documents)
    with torch.no_grad():
        capture(model, hidden=1, input_ids=ids, documents=documents)
    from transformers import Lfm2Config

    mixed = Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "full_attention"])
    hybrid = AutoModelForCausalLM.from_config(mixed)
    with pytest.raises(ValueError, match="documents: layer 0 of Lfm2ForCausalLM has no softmax attention"):
        capture(hybrid, hidden=1, input_ids=ids, documents=documents)
