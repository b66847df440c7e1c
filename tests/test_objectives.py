"""Each objective against a plain rewrite of it, on batches that the recipe makes."""

import copy
import functools
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import TEXTS, new_tokenizer, save_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from matt_fast import TrainingOptions, aim_loss, capture_attention
from matt_fast.alignment.next_token import next_token_classes
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.batches import Batch, collate
from matt_fast.data.chunks import Side, make_chunks
from matt_fast.data.continuations import with_continuations
from matt_fast.data.packing import Chunk
from matt_fast.initializers import initial_rows
from matt_fast.model import capture
from matt_fast.model.layers import decoder_layers
from matt_fast.model.teacher import Teacher
from matt_fast.training.loop import freeze, train
from matt_fast.training.objectives import combine, losses, trains_output
from matt_fast.training.options import OBJECTIVES
from matt_fast.training.sides import StepRows
from matt_fast.training.state import TrainingState
from matt_fast.training.student import make_student

LAYERS = 2
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "untied": GPTNeoXConfig(**SIZES, tie_word_embeddings=False),
}


class Sides:
    """A tiny model, both vocabularies and a padded batch; the student's tokenizer ends texts with its eos token."""

    def __init__(self, folder, kind: str, student_tokenizer=None):
        teacher_tokenizer = save_tiny_model(folder, CONFIGS[kind])
        student_tokenizer = student_tokenizer or new_tokenizer()
        student_tokenizer.pad_token = student_tokenizer.eos_token  # a pad token that is a real token too
        bos, eos = student_tokenizer.bos_token, student_tokenizer.eos_token
        student_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A {eos}",
            special_tokens=[(token, student_tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)],
        )
        self.model = Teacher(folder).load(torch.float32)
        freeze(self.model)
        rows = len(self.model.get_input_embeddings().weight)
        self.vocabulary = VocabularyPair(teacher_tokenizer, student_tokenizer, rows)
        self.start = initial_rows(self.model, self.vocabulary, "random", 0)
        self.student = make_student(self.model, self.vocabulary, self.start, freeze_shared=True, objectives=OBJECTIVES)
        sides = (
            Side("teacher", teacher_tokenizer, rows, 40),
            Side("student", student_tokenizer, self.vocabulary.rows, 40),
        )

        chunks = list(make_chunks(TEXTS[:6], *sides, Counter()))
        self.batch: Batch = collate([[chunks[0]], [chunks[3]], [chunks[-1]]], Counter())
        assert len(set((self.batch.student_documents >= 0).sum(1).tolist())) > 1  # there is padding

        self.batch = with_continuations(self.student.target.continuations, self.batch)

    def losses(self, objective: str, rows=None, **options) -> dict[str, torch.Tensor]:
        rows = rows or self.student.rows(self.batch.student_ids)
        chosen = TrainingOptions(objective=objective, **options)
        return losses(self.model, self.model, self.student, rows, self.batch, LAYERS, chosen)

    def whole_student(self):
        """The student as an ordinary model, all its embeddings trainable."""
        student = AutoModelForCausalLM.from_config(copy.deepcopy(self.model.config)).eval()
        student.load_state_dict(self.model.state_dict())
        student.resize_token_embeddings(self.vocabulary.rows, mean_resizing=False)
        student.get_input_embeddings().padding_idx = None
        student.get_input_embeddings().weight.data.copy_(self.student.input.weight())
        if self.student.output is not None:
            student.get_output_embeddings().weight.data.copy_(self.student.output.weight())
        return student

    def check_gradients(self, rows: StepRows, whole, atol: float) -> None:
        """Each table's leaf against a whole model; rows that are only read have a gradient where they occurred."""
        tables = self.student.tables
        modules = [whole.get_input_embeddings(), whole.get_output_embeddings()][: len(tables)]
        ids = [table.trainable_ids for table in tables]
        if self.student.output is not None:
            ids[0] = rows.input.ids[rows.input.positions]
        for leaf, trained, module in zip(rows.leaves, ids, modules, strict=True):
            torch.testing.assert_close(leaf.grad, module.weight.grad[trained], rtol=1e-3, atol=atol)


@pytest.fixture(params=list(CONFIGS))
def sides(tmp_path, request):
    return Sides(tmp_path / "teacher", request.param)


def test_ntp_equals_the_loss_of_transformers_and_its_gradients(sides):
    rows = sides.student.rows(sides.batch.student_ids)
    ours = sides.losses("ntp", rows)["ntp"]
    ours.backward()
    student = sides.whole_student()
    labels = sides.batch.student_ids.clone()
    labels[sides.batch.student_documents < 0] = -100
    assert (labels == sides.vocabulary.student.pad_token_id).sum() == len(labels)  # eos counts, padding does not
    theirs = student(input_ids=sides.batch.student_ids, labels=labels).loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    sides.check_gradients(rows, student, atol=1e-6)


@pytest.mark.parametrize("attn_implementation", [None, "eager"])
@pytest.mark.parametrize("objective", ["aim", "token-distillation", "ntp", "aim_star+ntp"])
def test_checkpointing_changes_no_gradient(sides, objective, attn_implementation):
    found = []
    for checkpointing in (False, True):
        rows = sides.student.rows(sides.batch.student_ids)
        loss = combine(
            sides.losses(
                objective,
                rows,
                backend="torch",
                attn_implementation=attn_implementation,
                checkpointing=checkpointing,
            )
        )
        loss.backward()
        gradients = [leaf.grad for leaf in rows.leaves]
        found.append([x for x in (loss, *gradients) if x is not None])  # not every objective reaches an untied head
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert sides.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("objective", "checkpointing"), [("aim", False), ("token-distillation", True)])
@pytest.mark.parametrize("sides", ["tied"], indirect=True)
def test_compiled_layers_give_the_same(sides, objective, checkpointing, monkeypatch):
    """Without a graph break; the compiler behind the graph is torch's own business, and slow."""
    compile_layer = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(capture, "_compiled", functools.cache(lambda forward: compile_layer(forward, dynamic=True)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        rows = sides.student.rows(sides.batch.student_ids)
        (loss,) = sides.losses(objective, rows, backend="torch", compile=compiled, checkpointing=checkpointing).values()
        loss.backward()
        found.append((loss, rows.input.trainable.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # with and without gradients


def test_checkpointing_says_where_it_does_nothing():
    with pytest.raises(ValueError, match="checkpointing: wanted an objective other than aim-all-layers"):
        TrainingOptions(objective="aim-all-layers", checkpointing=True)


def segment_spans(ids: torch.Tensor) -> list[list[tuple[int, int]]]:
    """(first, last) token of each segment, for each row, by walking along it."""
    spans = []
    for row in ids.tolist():
        found: dict[int, list[int]] = {}
        for position, segment in enumerate(row):
            if segment >= 0:
                found.setdefault(segment, []).append(position)
        spans.append([(positions[0], positions[-1]) for _, positions in sorted(found.items())])
    return spans


def test_token_distillation_compares_hidden_states_at_segment_ends(sides):
    ours = sides.losses("token-distillation")["token-distillation"]
    with torch.no_grad():
        hidden = [
            model(input_ids=ids, output_hidden_states=True).hidden_states[LAYERS]
            for model, ids in ((sides.model, sides.batch.teacher_ids), (sides.whole_student(), sides.batch.student_ids))
        ]
    squares = []
    spans = [segment_spans(x) for x in (sides.batch.teacher_segments, sides.batch.student_segments)]
    for row, (teacher, student) in enumerate(zip(*spans, strict=True)):
        for (_, t), (_, s) in zip(teacher, student, strict=True):
            squares.append((hidden[0][row, t] - hidden[1][row, s]) ** 2)
    torch.testing.assert_close(ours, torch.cat(squares).mean())


def test_boundary_head_predicts_the_next_segment_from_the_teachers_state(sides):
    rows = sides.student.rows(sides.batch.student_ids)
    sides.losses("boundary-head", rows)["boundary-head"].backward()
    ours = sides.losses("boundary-head")["boundary-head"]
    head = sides.model.get_output_embeddings()
    kept = []
    hook = head.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0]))
    with torch.no_grad():
        sides.model(input_ids=sides.batch.teacher_ids)
    hook.remove()
    weight = sides.student.head.weight.clone().requires_grad_()
    scores = []
    spans = [segment_spans(x) for x in (sides.batch.teacher_segments, sides.batch.student_segments)]
    for row, (teacher, student) in enumerate(zip(*spans, strict=True)):
        for (t, _), (s, _) in zip(teacher, student, strict=True):
            if t > 0:
                logits = kept[0][row, t - 1] @ weight.T
                scores.append(logits.log_softmax(-1)[sides.batch.student_ids[row, s]])
    theirs = -torch.stack(scores).mean()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(rows.output.trainable.grad, weight.grad[rows.output.ids], rtol=1e-4, atol=1e-7)
    assert len(scores) == sum(map(len, spans[0]))  # the teacher's bos token stands before the first segments


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_aim_of_all_layers_is_the_mean_over_layers(sides, metric):
    ours = sides.losses("aim-all-layers", metric=metric)["aim-all-layers"]
    student, batch = sides.whole_student(), sides.batch
    each = []
    for layer in range(LAYERS):
        with torch.no_grad():
            teacher = capture_attention(sides.model, layer, input_ids=batch.teacher_ids)
            other = capture_attention(student, layer, input_ids=batch.student_ids)
        ids = batch.teacher_segments, batch.student_segments
        each.append(aim_loss(teacher.states, other.states, *ids, metric=metric, scale=other.scale, backend="eager"))
    torch.testing.assert_close(ours, torch.stack(each).mean(), rtol=1e-4, atol=1e-9)
    last = sides.losses("aim", metric=metric)["aim"]
    torch.testing.assert_close(last, each[-1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_aim_star_compares_attention_outputs_at_segment_ends(sides, metric):
    """Written out: attention weights of the whole eager models, times values."""
    ours = sides.losses("aim_star", metric=metric)["aim_star"]
    outputs = []
    for model, side in ((sides.model, "teacher"), (sides.whole_student(), "student")):
        ids, segments = (getattr(sides.batch, f"{side}_{name}") for name in ("ids", "segments"))
        with torch.no_grad():
            value = capture_attention(model, LAYERS - 1, input_ids=ids).states[2]
            model.set_attn_implementation("eager")
            weights = model(input_ids=ids, output_attentions=True).attentions[LAYERS - 1]
            model.set_attn_implementation("sdpa")
        mixed = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)  # [B, H, n, d]
        ends = [[last for _, last in spans] for spans in segment_spans(segments)]
        outputs.append(torch.cat([mixed[row, :, last].flatten(0, 1) for row, last in enumerate(ends)]))
    teacher, student = outputs
    expected = (teacher - student).square().mean()
    if metric == "cosine":
        expected = (1 - torch.nn.functional.cosine_similarity(teacher, student, dim=-1)).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-9)


def log_probabilities(model, ids: torch.Tensor) -> torch.Tensor:
    """[n, vocabulary]: of the token behind each one of a document, given alone."""
    return model(input_ids=ids[None]).logits[0].log_softmax(-1)


def each_document(sides):
    """(ids, segments) of the teacher's and of the student's side of each row, without padding."""
    batch = sides.batch
    for row in range(len(batch.student_ids)):
        kept = batch.teacher_documents[row] >= 0, batch.student_documents[row] >= 0
        yield (
            (batch.teacher_ids[row][kept[0]], batch.teacher_segments[row][kept[0]]),
            (batch.student_ids[row][kept[1]], batch.student_segments[row][kept[1]]),
        )


@pytest.mark.parametrize("divergence", ["kl", "reverse-kl", "tvd"])
def test_alm_compares_the_likelihoods_of_segments(sides, divergence):
    ours = sides.losses("alm", alm_divergence=divergence, alm_temperature=7.0)["alm"]
    expected, whole = [], sides.whole_student()
    for pair in each_document(sides):
        likelihoods = []
        for model, (ids, segments) in zip((sides.model, whole), pair, strict=True):
            found, logs = {}, log_probabilities(model, ids)
            for position, segment in enumerate(segments.tolist()):
                if segment >= 0:
                    log = logs[position - 1, ids[position]].item() if position else None
                    found.setdefault(segment, []).append(log)
            likelihoods.append(found)
        for segment, logs in likelihoods[0].items():
            if None in logs or None in likelihoods[1][segment]:
                continue
            p, q = (np.exp(sum(x) / 7.0) for x in (logs, likelihoods[1][segment]))
            kl = lambda p, q: p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))  # noqa: E731
            expected.append({"kl": kl(p, q), "reverse-kl": kl(q, p), "tvd": abs(p - q)}[divergence])
    assert ours.item() == pytest.approx(np.mean(expected), rel=2e-4)


def test_boundary_kl_compares_what_may_come_behind_a_segment(sides):
    ours = sides.losses("boundary-kl")["boundary-kl"]
    *classes, count = next_token_classes(sides.vocabulary)
    expected, whole = [], sides.whole_student()
    for pair in each_document(sides):
        found = []
        for model, (ids, segments), of in zip((sides.model, whole), pair, map(torch.tensor, classes), strict=True):
            given = model(input_ids=ids[None]).logits[0][:, of >= 0].double().softmax(-1)
            sums = torch.stack([given[:, of[of >= 0] == x].sum(-1) for x in range(count)], -1)
            last = [i for i, x in enumerate(segments.tolist()) if x >= 0 and x not in segments.tolist()[i + 1 :]]
            found.append(sums[last])
        expected.append((found[0] * (found[0] / found[1]).log()).sum(-1))
    assert ours.item() == pytest.approx(torch.cat(expected).mean().item(), rel=2e-4)


def test_no_side_runs_further_than_its_objectives_need(sides, monkeypatch):
    layers = decoder_layers(sides.model)
    for objective, teacher, student in (
        ("aim", 1, 1),  # stopped inside the second layer
        ("token-distillation", 2, 2),
        ("boundary-head", 3, 0),
        ("aim+boundary-head", 3, 1),
        ("ntp", 0, 3),
        ("aim+ntp", 1, 3),
        ("aim_star+token-distillation+boundary-head", 3, 2),
    ):
        finished = []
        hooks = [
            layer.register_forward_hook(lambda *_, kept=finished: kept.append(torch.is_grad_enabled()))
            for layer in layers
        ]
        sides.losses(objective)
        for hook in hooks:
            hook.remove()
        assert (finished.count(False), finished.count(True)) == (teacher, student), objective


def test_later_objectives_are_scaled_to_the_first():
    first, second, third = (torch.tensor(x, requires_grad=True) for x in (0.5, 4.0, 0.0))
    total = combine({"aim": first * 1, "ntp": second * 1, "aim_star": third * 1})
    total.backward()
    assert total.item() == pytest.approx(1.0)
    assert (first.grad.item(), second.grad.item(), third.grad.item()) == (1.0, 0.125, 0.0)


@pytest.mark.parametrize("objective", [*OBJECTIVES, "aim+ntp", "aim+boundary-head"])
def test_training_lowers_every_objective_and_leaves_shared_rows_alone(sides, objective):
    before = [table.weight().clone() for table in sides.student.tables]
    options = TrainingOptions(objective=objective, steps=25, lr=1e-2, warmup_steps=5, decay_steps=5)
    names = options.objectives()
    batches = iter([sides.batch] * options.steps)
    history = []
    train(
        sides.model, sides.model, sides.student, batches, LAYERS, options, Accelerator(cpu=True),
        lambda progress: history.append(progress.parts),
    )  # fmt: skip
    for name in names:
        # in tied rows the two pull at each other; cross-entropy on a random model has little to gain
        least = 1.0 if name != names[0] else 0.97 if name in ("ntp", "boundary-head") else 0.9
        assert history[-1][name] < least * history[0][name]
    shared = torch.tensor(list(sides.vocabulary.matches))
    moved = [(table.weight() != old).any(1) for table, old in zip(sides.student.tables, before, strict=True)]
    for changed in moved:
        assert not changed[shared].any()
    reaches_input = any(name != "boundary-head" for name in names) or sides.student.output is None
    assert moved[0].any() == reaches_input
    if sides.student.output is not None:
        assert moved[1].any() == trains_output(names)
    # the head follows the table it is made of
    torch.testing.assert_close(sides.student.head.weight, sides.student.tables[-1].weight())


def test_dense_moments_move_rows_of_earlier_batches_in_the_head_too(sides):
    ids = sides.batch.student_ids
    other = replace(sides.batch, student_ids=torch.full_like(ids, int(ids[0, 0])), distinct_ids=ids[0, :1])
    options = TrainingOptions(objective="ntp", steps=3, moments="dense")
    after = []
    train(
        sides.model, sides.model, sides.student, iter([sides.batch, other, other]), LAYERS, options,
        Accelerator(cpu=True), lambda progress: after.append(sides.student.tables[-1].weight().clone()),
    )  # fmt: skip
    moved = sides.batch.distinct_ids[sides.student.tables[-1].slot[sides.batch.distinct_ids] >= 0]
    moved = moved[moved != ids[0, 0]]
    assert (after[1][moved] != after[2][moved]).any(1).all()
    torch.testing.assert_close(sides.student.head.weight, after[-1])


@pytest.mark.parametrize("moments", ["lazy", "dense"])
def test_output_rows_hear_of_the_batches_that_lack_their_tokens_when_these_come(sides, moments):
    """Against a whole model: what an update is given for a row is all gradients since the last one."""
    ids, table = sides.batch.student_ids, sides.student.tables[-1]
    came = torch.isin(table.trainable_ids, ids)
    one = table.trainable_ids[came][:1]  # of the tokens that come, the only one of the first and last batch
    other = replace(sides.batch, student_ids=torch.full_like(ids, int(one)), distinct_ids=one)
    options = TrainingOptions(objective="ntp", steps=1, moments=moments, max_grad_norm=None)
    state = TrainingState.begin(sides.student, options)
    waiting, moment = torch.zeros_like(table.trainable), torch.zeros_like(table.trainable)
    for batch, present in (
        (other, table.trainable_ids == one),
        (sides.batch, came),
        (other, table.trainable_ids == one),
    ):
        whole = sides.whole_student()
        labels = batch.student_ids.masked_fill(batch.student_documents < 0, -100)
        whole(input_ids=batch.student_ids, labels=labels).loss.backward()
        waiting += whole.get_output_embeddings().weight.grad[table.trainable_ids]
        state.progress.step = 0
        train(sides.model, sides.model, state, iter([batch]), LAYERS, options, Accelerator(cpu=True))
        moment[present if moments == "lazy" else slice(None)] *= 0.9
        moment[present] += 0.1 * waiting[present]
        waiting[present] = 0
        torch.testing.assert_close(state.optimizers[-1].first_moment, moment, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(state.pending, waiting, rtol=1e-3, atol=1e-6)
    assert state.pending[~came].any(1).all()  # as long as no token comes its row waits
    assert 1 < came.sum() < len(came)


def test_the_clock_starts_with_the_first_batch(sides):
    def batches():
        time.sleep(1)
        while True:
            yield sides.batch

    begin = time.perf_counter()
    progress, _ = train(
        sides.model, sides.model, sides.student, batches(), LAYERS, TrainingOptions(steps=2), Accelerator(cpu=True)
    )
    assert time.perf_counter() - begin >= progress.seconds + 1
    assert progress.seconds > progress.seconds_waiting


def test_a_batch_without_new_tokens_is_no_error(sides):
    """All rows frozen: nothing to train, and the step is counted."""
    frozen = sides.batch.student_ids.new_tensor(list(sides.vocabulary.matches))
    sides.batch.student_ids[:] = frozen[sides.batch.student_ids % len(frozen)]
    sides.batch = replace(sides.batch, distinct_ids=sides.batch.student_ids.unique())
    before = sides.student.input.weight().clone()
    options = TrainingOptions(objective="aim+ntp", steps=2)
    progress, _ = train(
        sides.model, sides.model, sides.student, iter([sides.batch] * 2), LAYERS, options, Accelerator(cpu=True)
    )
    assert progress.steps_without_new_tokens == 2
    assert torch.equal(sides.student.input.weight(), before)


WITH_HEAD = ("ntp", "boundary-head", "aim+ntp", "ntp+aim", "aim+boundary-head", "ntp+boundary-head+aim")


@pytest.mark.parametrize("objective", WITH_HEAD)
def test_a_batch_with_nothing_to_predict_counts_as_zero(sides, objective):
    """One token a row: nothing follows it, and nothing is before it. AIM has the influence of a token on itself."""
    whole, token = sides.batch, int(sides.student.input.trainable_ids[-1])
    ids, zero = torch.tensor([[token]]), np.zeros(1, np.int64)
    nothing = collate([[Chunk(np.array([5]), np.array([token]), zero, zero)]] * 2, Counter())
    assert (nothing.student_ids == ids).all()
    rows, expected_rows = (sides.student.rows(nothing.student_ids) for _ in range(2))
    sides.batch = nothing
    parts = sides.losses(objective, rows)
    total = combine(parts)
    assert {name: part.item() for name, part in parts.items() if name != "aim"} == {
        name: 0.0 for name in parts if name != "aim"
    }
    first = next(iter(parts))
    aim_alone = sides.losses("aim", expected_rows)["aim"] if first == "aim" else None
    assert total.item() == (0.0 if aim_alone is None else aim_alone.item())
    total.backward()
    if aim_alone is not None:
        aim_alone.backward()
    for leaf, expected in zip(rows.leaves, expected_rows.leaves, strict=True):
        wanted = torch.zeros_like(leaf) if expected.grad is None else expected.grad
        got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    options = TrainingOptions(objective=objective, steps=3, lr=1e-2)
    batches = iter([nothing, whole, nothing])
    progress, _ = train(sides.model, sides.model, sides.student, batches, LAYERS, options, Accelerator(cpu=True))
    assert [loss > 0 for loss in progress.losses] == [first == "aim", True, first == "aim"]
    assert progress.first_loss == progress.losses[first != "aim"]  # what later losses are held against


def test_learning_rate_schedule():
    options = TrainingOptions(steps=10, lr=2.0, warmup_steps=4, decay_steps=2)
    assert [options.lr_at(step) for step in range(1, 11)] == [0.5, 1.0, 1.5, 2, 2, 2, 2, 2, 2, 1.0]
    assert TrainingOptions(steps=3, lr=2.0, decay_steps=0).lr_at(3) == 2.0
    halved = TrainingOptions(steps=11, lr=2.0, warmup_steps=2)
    assert [halved.lr_at(step) for step in range(1, 12)] == [1, 2, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5]
    assert TrainingOptions(steps=1).lr_at(1) == 3e-3
