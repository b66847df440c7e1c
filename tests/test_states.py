"""Rows from the teacher's states: spelled text, output rows, input rows, tied rows, against plain rewrites."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXTS, byte_level, new_tokenizer, save_tiny_model
from transformers import (
    AutoModelForMaskedLM,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    ModernBertConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from matt_fast.alignment.vocabulary import VocabularyPair, start_of_text
from matt_fast.initializers import boundary, composed, contextual, initial_rows, states
from matt_fast.initializers.boundary import BoundaryStates, boundary_rows, boundary_states, tied_rows
from matt_fast.initializers.contextual import contextual_rows, mean_square_jacobian
from matt_fast.initializers.spelled import spell_texts
from matt_fast.initializers.states import text_loss
from matt_fast.model.head import logit_rule
from matt_fast.model.layers import decoder_layers
from matt_fast.model.teacher import Teacher
from matt_fast.recipe import export

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama untied": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny_model(folder, CONFIGS[request.param]())
    source = Teacher(folder)
    model = source.load(torch.float32)
    rows = len(model.get_input_embeddings().weight)
    return model, VocabularyPair(source.load_tokenizer(), new_tokenizer(), rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model(folder)
    source = Teacher(folder)
    model = source.load(torch.float32)
    return model, VocabularyPair(source.load_tokenizer(), new_tokenizer(), len(model.get_input_embeddings().weight))


def spelling(vocabulary: VocabularyPair, token: int) -> list[int]:
    match = vocabulary.matches.get(token)
    return [match.teacher_id] if match else list(vocabulary.subtokens.get(token, []))


def test_spelled_text_is_the_teachers_bytes_of_the_same_text(llama):
    _, vocabulary = llama
    texts = ["", *TEXTS, "x\n", "né 日本 🙂"]
    text = spell_texts(texts, vocabulary)
    expected, starts, ids = [], [], []
    for document in filter(None, texts):
        for token in [-1, *vocabulary.student(document, add_special_tokens=False)["input_ids"]]:
            ids.append(token)
            starts.append(len(expected))
            expected += [vocabulary.teacher.bos_token_id] if token == -1 else spelling(vocabulary, token)
    assert text.teacher_ids.tolist() == expected
    assert text.starts.tolist() == [*starts, len(expected)]
    assert text.ids.tolist() == ids
    counts = text.counts(vocabulary.rows)
    assert counts.tolist() == [ids.count(i) for i in range(vocabulary.rows)]
    assert text.prefix == [vocabulary.teacher.bos_token_id]
    decoded = vocabulary.teacher.decode([i for i in expected if i != vocabulary.teacher.bos_token_id])
    assert decoded == "".join(texts)


@settings(max_examples=20, deadline=None)
@given(each=st.integers(1, 4), width=st.integers(1, 40), seed=st.integers(0, 3))
def test_contexts_are_what_stands_before_the_token(llama, each, width, seed):
    _, vocabulary = llama
    text = spell_texts(TEXTS, vocabulary)
    tokens = torch.tensor(sorted(vocabulary.subtokens))
    drawn, again = (text.occurrences(tokens, each, width, seed) for _ in range(2))
    ids, contexts = drawn.ids, drawn.before
    assert torch.equal(ids, again.ids)
    assert torch.equal(contexts, again.before)
    assert torch.equal(drawn[ids == ids[0]].before, contexts[ids == ids[0]])
    assert contexts.shape == (len(ids), 1 + width)
    places = {}
    for token, start in zip(text.ids, text.starts[:-1], strict=True):
        if token in vocabulary.subtokens and start >= width:
            places.setdefault(int(token), set()).add(tuple(text.teacher_ids[start - width : start]))
    found = {}
    for token, context in zip(ids.tolist(), contexts.tolist(), strict=True):
        assert context[0] == vocabulary.teacher.bos_token_id
        assert tuple(context[1:]) in places[token]
        found[token] = found.get(token, 0) + 1
    assert found.keys() == places.keys()
    assert max(found.values()) <= each
    assert ids.tolist() == sorted(ids.tolist())


def test_stretches_cover_the_text_once_and_name_the_boundaries(llama):
    _, vocabulary = llama
    text = spell_texts(TEXTS, vocabulary)
    seen, boundaries = [], 0
    for ids, positions in text.stretches(7, seed=1):
        assert ids[0] == vocabulary.teacher.bos_token_id
        seen += ids[1:].tolist()
        boundaries += len(positions)
        assert positions.min() >= 0
        assert positions.max() < len(ids)
    assert sorted(seen) == sorted(text.teacher_ids.tolist())
    assert boundaries == len(text.ids)  # every token of this tokenizer has a spelling, so each starts somewhere else


def test_pairs_of_stretches_end_together(llama):
    """Both sides of a stretch spell the same bytes up to each compared position."""
    _, vocabulary = llama
    text = spell_texts([*TEXTS[:6], "né 日本 🙂"], vocabulary)
    bos, seen = vocabulary.student.bos_token_id, 0
    for pair in text.pairs(7, 1000, [bos], seed=1):
        assert pair.student_ids[0] == bos
        assert pair.teacher_ids[0] == vocabulary.teacher.bos_token_id
        for position, end in zip(pair.positions.tolist(), pair.ends.tolist(), strict=True):
            ours = [i for i in pair.student_ids[: position + 1].tolist() if i != bos]
            theirs = [i for i in pair.teacher_ids[: end + 1].tolist() if i != vocabulary.teacher.bos_token_id]
            assert [piece for i in ours for piece in spelling(vocabulary, i)] == theirs
        seen += len(pair.positions)
    assert seen == (text.ids >= 0).sum()  # each token of the text once; all have a spelling here
    assert len(text.pairs(7, 2, [bos], seed=1)) == 2


def test_stretches_fit_the_positions_of_a_model(llama):
    """New tokens of many pieces make the teacher's side of a stretch several times as long as the student's."""
    _, vocabulary = llama
    whole, fitting = spell_texts(TEXTS, vocabulary), spell_texts(TEXTS, vocabulary, most=20)
    stretches = [ids for ids, _ in fitting.stretches(256, seed=1)]
    assert max(map(len, stretches)) <= 20
    assert sum(len(ids) - 1 for ids in stretches) == len(whole.teacher_ids)  # nothing is left out
    bos = vocabulary.student.bos_token_id
    pairs = fitting.pairs(256, 10_000, [bos], seed=1)
    assert max(len(x.teacher_ids) for x in pairs) <= 20
    assert max(len(x.student_ids) for x in pairs) <= 20
    assert sum(len(x.positions) for x in pairs) == (whole.ids >= 0).sum()
    assert max(map(len, fitting.student_stretches(256, 10_000, seed=1))) < 20
    few = spell_texts(TEXTS, vocabulary, most=4)  # a token of more pieces than there are positions is passed over
    assert max(map(len, vocabulary.subtokens.values())) > 3
    assert max(len(ids) for ids, _ in few.stretches(256, seed=1)) == 4


def test_rows_are_judged_by_other_text_than_they_were_fitted_to(llama):
    _, vocabulary = llama
    text = spell_texts([" ".join(str(i * 7919) for i in range(300))], vocabulary)
    count = len(list(text.stretches(16, seed=1)))
    fitted = {tuple(pair.student_ids.tolist()) for pair in text.pairs(16, count - 3, [], seed=1)}
    judged = {tuple(ids.tolist()) for ids in text.student_stretches(16, 3, seed=1)}
    assert (len(fitted), len(judged)) == (count - 3, 3)
    assert not fitted & judged


@pytest.mark.parametrize("method", ["composed", "contextual"])
def test_a_model_with_few_positions_is_read_within_them(method, tmp_path):
    save_tiny_model(tmp_path, GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, tie_word_embeddings=False))
    source = Teacher(tmp_path)
    model = source.load(torch.float32)
    vocabulary = VocabularyPair(source.load_tokenizer(), new_tokenizer(), len(model.get_input_embeddings().weight))
    rows = initial_rows(model, vocabulary, method, 0, texts=TEXTS)
    assert len(rows.report.made) > 20
    assert rows.input.isfinite().all()


@pytest.mark.parametrize("method", ["composed", "contextual"])
def test_a_padding_id_beyond_a_smaller_vocabulary_is_none_of_its_rows(method, tmp_path):
    """As of models whose padding token stands behind all others, which get a vocabulary a part as large."""
    tokenizer = save_tiny_model(tmp_path)
    model = Teacher(tmp_path).load(torch.float32)
    student = byte_level([x.upper() for x in TEXTS], 268, bos_token="<s>", eos_token="</s>")
    vocabulary = VocabularyPair(tokenizer, student, 275)
    found = []
    for padding in (None, 274):
        model.get_input_embeddings().padding_idx = padding
        found.append(initial_rows(model, vocabulary, method, 0, texts=[x.upper() for x in TEXTS]).input)
        assert model.get_input_embeddings().padding_idx == padding
    assert torch.equal(*found)


def test_boundary_states_are_those_of_a_plain_pass(pair):
    model, vocabulary = pair
    text = spell_texts(TEXTS[:3], vocabulary)
    found = boundary_states(model, text, seed=0).states
    expected = []
    head = model.get_output_embeddings()
    for ids, positions in text.stretches(boundary.STRETCH, seed=0):
        kept = []
        hook = head.register_forward_pre_hook(lambda module, given, kept=kept: kept.append(given[0]))
        with torch.no_grad():
            model(input_ids=ids[None])
        hook.remove()
        expected.append(kept[0][0, positions])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_the_level_adds_one_to_logits_whose_states_share_a_direction():
    generator = torch.Generator().manual_seed(0)
    states = 0.1 * torch.randn(400, 12, generator=generator) + torch.arange(12.0)
    for scale in (1.0, 0.5):
        found = BoundaryStates(states, {"scale": scale, "softcap": None}).level()
        logits = scale * states @ found
        np.testing.assert_allclose(logits, 1, atol=0.05)


def test_new_tokens_are_expected_as_often_as_they_occur(pair):
    model, vocabulary = pair
    text = spell_texts(TEXTS, vocabulary)
    read = boundary_states(model, text, seed=0)
    weight = model.get_output_embeddings().weight.detach()
    means = initial_rows(model, vocabulary, "mean", 0)
    means = means.input if means.output is None else means.output
    before = means.clone()
    ids, rows = boundary_rows(weight, means, None, vocabulary, text.counts(vocabulary.rows), read)
    assert torch.equal(means, before)
    assert ids.tolist() == sorted(vocabulary.subtokens)
    table = means.clone()
    table[ids] = rows

    def gap(table: torch.Tensor) -> float:
        logits = read.rule["scale"] * read.states.double() @ table.double().T
        expected = logits.softmax(-1).mean(0)
        counts = text.counts(vocabulary.rows).double() + boundary.SMOOTHING
        return float((expected.log() - (counts / counts.sum()).log())[ids].abs().mean())

    assert gap(table) < 0.3 * gap(before)


def test_a_strong_prior_leaves_levels_at_the_share_of_what_begins_alike(llama, monkeypatch):
    model, vocabulary = llama
    monkeypatch.setattr(boundary, "PRIOR", 1e15)
    text = spell_texts(TEXTS, vocabulary)
    read = boundary_states(model, text, seed=0)
    weight = model.get_output_embeddings().weight.detach()
    means, counts = initial_rows(model, vocabulary, "mean", 0).input, text.counts(vocabulary.rows)
    ids, rows = boundary_rows(weight, means, None, vocabulary, counts, read)
    alike = {}
    for token in vocabulary.tokens:
        if pieces := spelling(vocabulary, token):
            alike.setdefault(pieces[0], []).append(counts[token].item() + boundary.SMOOTHING)
    for token, row in zip(ids.tolist(), rows, strict=True):
        pieces = spelling(vocabulary, token)
        share = np.log((counts[token].item() + boundary.SMOOTHING) / sum(alike[pieces[0]]))
        start = boundary.FIRST_PIECE * weight[pieces[0]] + (1 - boundary.FIRST_PIECE) * weight[pieces].mean(0)
        torch.testing.assert_close(row, start + share * read.level(), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(weight=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_tied_rows_are_the_least_of_both_costs(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    wishes = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    metrics = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    metrics = [m @ m.T for m in metrics]
    rows = tied_rows(*wishes, *metrics, weight).requires_grad_()
    cost = sum(
        factor * torch.einsum("rd,de,re->", rows - wish, metric / metric.trace(), rows - wish)
        for factor, wish, metric in zip((1, weight), wishes, metrics, strict=True)
    )
    (gradient,) = torch.autograd.grad(cost, rows)
    assert gradient.abs().max() < 1e-8 * (1 + weight)


def test_the_loss_of_a_text_is_that_of_the_model_with_the_new_rows(pair, tmp_path):
    model, vocabulary = pair
    rows = initial_rows(model, vocabulary, "random", 0)
    output = rows.input if rows.output is None else rows.output
    stretches = spell_texts(TEXTS, vocabulary).student_stretches(16, 3, seed=0)
    assert [len(part) for part in stretches] == [16] * 3 or min(map(len, stretches)) > 1
    found = text_loss(model, rows.input, output, None, logit_rule(model), stretches)
    changed = copy.deepcopy(model)
    export.replace_vocabulary(changed, rows)
    expected = 0.0
    for ids in stretches:
        loss = changed(input_ids=ids[None], labels=ids[None]).loss  # the mean of all but the first
        expected += loss.item() * (len(ids) - 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("better", [True, False])
def test_rows_that_cost_more_than_their_start_are_not_taken(llama, monkeypatch, better):
    model, vocabulary = llama
    losses = iter([1.0, 2.0] if better else [2.0, 1.0])
    monkeypatch.setattr(states, "text_loss", lambda *given: next(losses))
    rows = initial_rows(model, vocabulary, "contextual", 0, texts=TEXTS)
    plain = initial_rows(model, vocabulary, "mean", 0)
    assert torch.equal(rows.input, plain.input) != better
    assert (rows.report.initialized > 0) == better


def test_of_a_tied_tables_changes_the_text_chooses_how_much(llama, monkeypatch):
    model, vocabulary = llama

    def rows(init: str, losses: list[float], **given) -> torch.Tensor:
        told = iter(losses)
        monkeypatch.setattr(states, "text_loss", lambda *given: next(told))
        return initial_rows(model, vocabulary, init, 0, texts=TEXTS, **given).input

    boundary, start = (rows("mean", losses, init_head="boundary") for losses in ([1.0, 2.0], [2.0, 1.0]))
    whole, half, none, as_it_was = (rows("composed", [float(i != chosen) for i in range(4)]) for chosen in range(4))
    assert not torch.equal(whole, boundary)
    torch.testing.assert_close(half, (whole + boundary) / 2)
    assert torch.equal(none, boundary)
    assert torch.equal(as_it_was, start)


def plain_states(model, vocabulary, rows, ids, contexts, layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher's and student's states, one occurrence after another, without a cache."""
    embedding = model.get_input_embeddings()
    kept = {}
    hook = (
        model.get_decoder()
        .layers[layer]
        .register_forward_hook(
            lambda module, given, output: kept.update(found=output[0] if isinstance(output, tuple) else output)
        )
    )
    found = []
    for row, token, context in zip(rows, ids, contexts, strict=True):
        whole = torch.cat([context, torch.tensor(vocabulary.subtokens[int(token)])])
        model(input_ids=whole[None])
        teacher = kept["found"][0, -1]
        with contextual.rows_of_any_number(embedding):
            one = torch.func.functional_call(embedding, {"weight": row[None]}, (torch.tensor([[0]]),))
        model(inputs_embeds=torch.cat([embedding(context[None]), one], 1))
        found.append((teacher, kept["found"][0, -1]))
    hook.remove()
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


HYBRID = {"num_key_value_heads": 2, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_n_heads": 4, "mamba_d_head": 16}
REMEMBERING = {
    "keys and values": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "of some tokens": CONFIGS["gemma3"],
    "states, in some layers": lambda: JambaConfig(
        **SIZES, num_key_value_heads=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2
    ),
    "both in one layer": lambda: FalconH1Config(**SIZES, **HYBRID, mamba_d_ssm=64),
    "under another name": lambda: MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=4),
    "in the model itself": lambda: RecurrentGemmaConfig(**SIZES, lru_width=32, attention_window_size=16),
}


@pytest.mark.parametrize("kind", REMEMBERING)
def test_a_tokens_state_is_that_behind_its_context_whatever_a_model_remembers(tmp_path, kind):
    save_tiny_model(tmp_path, REMEMBERING[kind]())
    model = Teacher(tmp_path).load(torch.float32)
    embedding = model.get_input_embeddings()
    vocabulary = VocabularyPair(Teacher(tmp_path).load_tokenizer(), new_tokenizer(), len(embedding.weight))
    drawn = spell_texts(TEXTS, vocabulary).occurrences(torch.tensor(sorted(vocabulary.subtokens)), 1, 9, 0)[:7]
    places = contextual._Places(model, vocabulary, 1, drawn)
    rows = torch.randn(len(drawn.ids), 32, requires_grad=True)
    with contextual.rows_of_any_number(embedding):
        states = places.states(rows)
        (found,) = torch.autograd.grad(states.square().sum(), rows)
    kept = {}
    decoder_layers(model)[1].register_forward_hook(lambda module, given, output: kept.update(states=output))

    def last(**inputs) -> torch.Tensor:
        model(**inputs, use_cache=False)
        return (kept["states"][0] if isinstance(kept["states"], tuple) else kept["states"])[0, -1]

    for i, (token, before) in enumerate(zip(drawn.ids.tolist(), drawn.before, strict=True)):
        pieces = torch.tensor(vocabulary.subtokens[token])
        torch.testing.assert_close(places.goal[i], last(input_ids=torch.cat([before, pieces])[None]).detach())
        row = rows[i].detach().requires_grad_()
        with contextual.rows_of_any_number(embedding):
            one = torch.func.functional_call(embedding, {"weight": row[None]}, (torch.tensor([[0]]),))
        state = last(inputs_embeds=torch.cat([embedding(before[None]).detach(), one], 1))
        torch.testing.assert_close(states[i], state)
        (expected,) = torch.autograd.grad(state.square().sum(), row)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)


def test_input_rows_come_nearer_to_the_teachers_states(pair, monkeypatch):
    model, vocabulary = pair
    text = spell_texts(TEXTS, vocabulary)
    rows = initial_rows(model, vocabulary, "mean", 0)
    start = rows.input
    drawn = text.occurrences(torch.tensor(sorted(vocabulary.subtokens)), contextual.CONTEXTS, contextual.WIDTH, 0)
    occurring, contexts = drawn.ids, drawn.before
    matrix = mean_square_jacobian(model, vocabulary, start, drawn, 1, seed=0)
    ids, found = contextual_rows(model, vocabulary, start, matrix, drawn, layer=1)
    assert ids.tolist() == sorted(set(occurring.tolist()))
    solved = start.clone()
    solved[ids] = found
    distance = {}
    with torch.no_grad():
        for name, table in (("start", start), ("solved", solved)):
            goal, states = plain_states(model, vocabulary, table[occurring], occurring, contexts, 1)
            owner = torch.searchsorted(ids, occurring)
            distance[name] = torch.zeros(len(ids)).index_add_(0, owner, (goal - states).square().sum(1))
    assert (distance["solved"] <= distance["start"] * 1.0001 + 1e-6).all()
    assert distance["solved"].sum() < 0.8 * distance["start"].sum()
    monkeypatch.setattr(contextual, "PRIOR", 1e12)
    ids, found = contextual_rows(model, vocabulary, start, matrix, drawn, layer=1)
    torch.testing.assert_close(found, start[ids], rtol=0, atol=1e-6)


def test_the_metric_is_the_mean_square_jacobian(llama, monkeypatch):
    model, vocabulary = llama
    monkeypatch.setattr(contextual, "PROBES", 400)
    text = spell_texts(TEXTS, vocabulary)
    start = initial_rows(model, vocabulary, "mean", 0).input
    tokens = torch.tensor(sorted(vocabulary.subtokens))
    drawn = text.occurrences(tokens, 400, contextual.WIDTH, 0)  # many probes of the same few tokens
    occurring, contexts = drawn.ids, drawn.before
    found = mean_square_jacobian(model, vocabulary, start, drawn, 1, seed=0)
    chosen = torch.randperm(len(occurring), generator=torch.Generator().manual_seed(0))[:400]
    exact = torch.zeros_like(found)
    for place in chosen[:60]:
        token, context = occurring[place], contexts[place]
        jacobian = torch.autograd.functional.jacobian(
            lambda row, token=token, context=context: plain_states(
                model, vocabulary, row[None], token[None], context[None], 1
            )[1][0],
            start[token],
        )
        exact += jacobian.T @ jacobian / 60
    assert abs(float(found.trace() / exact.trace()) - 1) < 0.3

    def cosine(matrix: torch.Tensor) -> float:
        return float((matrix * exact).sum() / matrix.norm() / exact.norm())

    assert cosine(found) > 0.9
    # A row that is nearly 0 has an enormous derivative behind the first norm: one place must not be all of the mean.
    tokens, counts = occurring[chosen].unique(return_counts=True)
    rare = tokens[counts.argmin()]
    start[rare] *= 1e-3
    bounded = mean_square_jacobian(model, vocabulary, start, drawn, 1, seed=0)
    assert cosine(bounded) > 0.8
    monkeypatch.setattr(contextual, "LONGEST", torch.inf)
    assert cosine(mean_square_jacobian(model, vocabulary, start, drawn, 1, seed=0)) < 0.6


def test_composed_rows_are_one_map_of_pieces(pair, monkeypatch):
    """The map reads first piece, last piece and mean; the rows bring the states of whole stretches nearer."""
    model, vocabulary = pair
    monkeypatch.setattr(composed, "LENGTH", 32)
    monkeypatch.setattr(composed, "STRETCHES", 16)
    monkeypatch.setattr(composed, "RATE", 0.2)
    text, prefix, calls = spell_texts(TEXTS, vocabulary), start_of_text(vocabulary.student), []
    start = initial_rows(model, vocabulary, "mean", 0).input
    given = model, vocabulary, start, text, prefix, 1, 0
    ids, rows = composed.composed_rows(*given, None, lambda *call: calls.append(call))
    assert torch.equal(rows, composed.composed_rows(*given)[1])
    assert ids.tolist() == sorted(vocabulary.subtokens)
    assert calls[-1] == (len(ids), len(ids))
    weight, features = model.get_input_embeddings().weight, []
    for token in ids.tolist():
        pieces = [weight[i].detach() for i in vocabulary.subtokens[token]]
        features.append(torch.cat([pieces[0], pieces[-1], sum(pieces) / len(pieces)]))
    asked = torch.cat([ids.flip(0), torch.tensor(list(vocabulary.matches)[:3])])
    found = composed._Pieces(weight.detach(), vocabulary)(asked)
    torch.testing.assert_close(found, torch.cat([torch.stack(features).flip(0), torch.zeros(3, 3 * start.shape[1])]))
    change = rows - start[ids]

    def distance(table: torch.Tensor) -> float:
        away, usual = [], []
        for one in text.pairs(32, 16, prefix, seed=0):
            states = []
            for ids, rows in ((one.teacher_ids, None), (one.student_ids, table)):
                kept = []
                hook = decoder_layers(model)[1].register_forward_hook(lambda *x, kept=kept: kept.append(x[2]))
                with torch.no_grad():
                    embedding = model.get_input_embeddings()
                    scale = getattr(embedding, "embed_scale", 1.0)
                    model(**({"input_ids": ids[None]} if rows is None else {"inputs_embeds": rows[ids][None] * scale}))
                hook.remove()
                states.append(kept[0][0] if isinstance(kept[0], tuple) else kept[0])
            theirs, ours = states[0][0][one.ends], states[1][0][one.positions]
            away.append((theirs - ours).square().sum(1))
            usual.append(theirs)
        usual = torch.cat(usual)
        lengths = (usual - usual.median(0).values).square().sum(1)
        return float((torch.cat(away) / (lengths + lengths.median())).mean())

    assert distance(start.index_copy(0, ids, rows)) < 0.9 * distance(start)
    # In a tied table what is added costs what it changes of logits: an enormous metric leaves rows where they are.
    tied = composed.TiedTo(1e6 * torch.eye(start.shape[1]), torch.eye(start.shape[1]))
    held = composed.composed_rows(*given, tied)[1]
    assert (held - start[ids]).norm() < 0.3 * change.norm()


def test_one_enormous_gradient_does_not_lead_the_map_astray(llama, monkeypatch):
    """With SmolLM2-135M one step's can be a hundred times as long as all others: Adam followed it, and stayed there."""
    model, vocabulary = llama
    start = initial_rows(model, vocabulary, "mean", 0).input
    text, prefix = spell_texts(TEXTS, vocabulary), start_of_text(vocabulary.student)
    monkeypatch.setattr(composed, "LENGTH", 32)
    monkeypatch.setattr(composed, "TOGETHER", 2)
    given = model, vocabulary, start, text, prefix, 1, 0
    _, rows = composed.composed_rows(*given)
    exact, calls = torch.autograd.grad, []

    def one_is_enormous(*arguments):
        calls.append(arguments)
        return tuple(x * (1000 if len(calls) == 2 else 1) for x in exact(*arguments))

    monkeypatch.setattr(torch.autograd, "grad", one_is_enormous)
    torch.testing.assert_close(composed.composed_rows(*given)[1], rows)
    assert len(calls) > 2


@pytest.mark.parametrize(
    ("init", "init_head"),
    [("contextual", "same"), ("composed", "same"), ("mean", "boundary"), ("random", "boundary")],
)
def test_rows_of_a_whole_vocabulary(pair, init, init_head):
    model, vocabulary = pair
    given = {"texts": TEXTS, "init_head": init_head}
    found = initial_rows(model, vocabulary, init, 0, **given)
    again = initial_rows(model, vocabulary, init, 0, **given)
    plain = initial_rows(model, vocabulary, init if init == "random" else "mean", 0)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    shared = list(vocabulary.matches)
    assert torch.equal(found.input, again.input)
    assert torch.equal(found.input[shared], plain.input[shared])
    assert found.input.isfinite().all()
    assert (found.output is None) == tied
    if not tied:
        assert torch.equal(found.output, again.output)
        assert torch.equal(found.output[shared], plain.output[shared])
        assert not torch.equal(found.output, plain.output)
        assert torch.equal(found.input, plain.input) == (init in ("mean", "random"))
    spelled = set(vocabulary.subtokens)
    unspelled = [i for i in vocabulary.tokens if i not in spelled and i not in vocabulary.matches]
    assert torch.equal(found.input[unspelled], plain.input[unspelled])


def test_bad_input_is_named(llama, tmp_path):
    model, vocabulary = llama
    with pytest.raises(ValueError, match=r"init_head: wanted one of same, boundary, mean, .*, got 'none'"):
        initial_rows(model, vocabulary, "mean", 0, init_head="none")
    with pytest.raises(ValueError, match=r"texts: wanted text to read the teacher's states in for init 'contextual'"):
        initial_rows(model, vocabulary, "contextual", 0)
    with pytest.raises(ValueError, match=r"texts: .* for init_head 'boundary', got none"):
        initial_rows(model, vocabulary, "mean", 0, init_head="boundary")
    with pytest.raises(ValueError, match=r"init_head: wanted same or boundary for a model whose output head is tied"):
        initial_rows(model, vocabulary, "contextual", 0, texts=TEXTS, init_head="first-piece")
    with pytest.raises(ValueError, match=r"texts: wanted text in which new tokens occur, got none"):
        initial_rows(model, vocabulary, "contextual", 0, texts=["", ""])
    with pytest.raises(ValueError, match=r"texts: wanted text with new tokens, 24 teacher tokens or more before them"):
        initial_rows(model, vocabulary, "contextual", 0, texts=["def"])


def test_an_encoder_is_refused(tmp_path):
    config = ModernBertConfig(**SIZES, pad_token_id=0, vocab_size=300)
    model = AutoModelForMaskedLM.from_config(config)
    save_tiny_model(tmp_path)
    vocabulary = VocabularyPair(Teacher(tmp_path).load_tokenizer(), new_tokenizer(), 300)
    with pytest.raises(ValueError, match="need a causal language model, which predicts the next token; got ModernBert"):
        initial_rows(model, vocabulary, "contextual", 0, texts=TEXTS)
