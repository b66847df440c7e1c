"""First rows against plain loops over tokens."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXTS, byte_level, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from matt_fast.alignment.vocabulary import Match, VocabularyPair
from matt_fast.initializers import METHODS, initial_rows, initialize, linear
from matt_fast.initializers.fasttext import fasttext_vectors
from matt_fast.initializers.omp import apply as omp_apply
from matt_fast.initializers.omp import omp_coefficients
from matt_fast.model.teacher import Teacher

WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
MATCHES = {1: Match(5, "bytes"), 4: Match(0, "role")}
SUBTOKENS = {0: [1, 1, 3], 3: [2]}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_mean_of_subtokens():
    rows = initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method="mean")
    expected = [
        (2 * WEIGHT[1] + WEIGHT[3]) / 3,
        WEIGHT[5],
        WEIGHT.mean(0),  # no spelling
        WEIGHT[2],
        WEIGHT[0],
        WEIGHT.mean(0),
    ]
    torch.testing.assert_close(rows, torch.stack(expected))


def test_mean_weighted_by_length_and_zero():
    lengths = {0: 1, 1: 2, 2: 7, 3: 5, 4: 1, 5: 1}
    rows = initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method="length-mean", teacher_lengths=lengths)
    torch.testing.assert_close(rows[0], (4 * WEIGHT[1] + 5 * WEIGHT[3]) / 9)
    torch.testing.assert_close(rows[3], WEIGHT[2])
    torch.testing.assert_close(rows[2], WEIGHT.mean(0))
    rows = initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method="zero")
    assert (rows == 0).all(1).tolist() == [True, False, True, True, False, True]
    with pytest.raises(ValueError, match="teacher_lengths: wanted the bytes of each teacher token"):
        initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method="length-mean")


@pytest.mark.parametrize("method", ["first-piece", "last-piece", "exponential-first", "exponential-last"])
def test_pieces_weighted_by_their_place(method):
    pieces = {0: [1, 1, 3], 2: [0, 2, 4, 5], 3: [2]}
    rows = initialize(WEIGHT, 6, MATCHES, pieces, method=method)
    for token, ids in pieces.items():
        ids = ids if "first" in method else ids[::-1]
        total, expected = 0.0, torch.zeros(4, dtype=torch.float64)
        for place, piece in enumerate(ids):
            share = np.exp(2.0 * (len(ids) - place)) if "exponential" in method else float(place == 0)
            total += share
            expected += share * WEIGHT[piece].double()
        torch.testing.assert_close(rows[token], (expected / total).float())
    torch.testing.assert_close(rows[5], WEIGHT.mean(0))


def test_a_function_of_ones_own():
    ours = torch.arange(24.0).view(6, 4)
    rows = initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method=lambda *given: ours)
    assert torch.equal(rows[[0, 2, 3, 5]], ours[[0, 2, 3, 5]])
    assert torch.equal(rows[[1, 4]], WEIGHT[[5, 0]])
    assert torch.equal(ours, torch.arange(24.0).view(6, 4))
    with pytest.raises(ValueError, match=r"method: wanted rows of shape \(6, 4\) from it, got \(6, 3\)"):
        initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method=lambda *given: ours[:, :3])


def test_random_has_the_teachers_mean_and_covariance():
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.3, 0.1]])
    weight = torch.randn(500, 3, generator=torch.Generator().manual_seed(1)) @ mixing.T + torch.tensor([1.0, -2.0, 0.0])
    rows = initialize(weight, 40_000, {}, {}, method="random", seed=3)
    np.testing.assert_allclose(np.cov(rows.numpy().T), np.cov(weight.numpy().T), atol=0.08)
    np.testing.assert_allclose(rows.mean(0), weight.mean(0), atol=0.05)
    assert torch.equal(rows, initialize(weight, 40_000, {}, {}, method="random", seed=3))
    assert not torch.equal(rows, initialize(weight, 40_000, {}, {}, method="random", seed=4))


def test_shared_rows_are_the_teachers_whatever_the_method():
    lengths = dict.fromkeys(range(6), 1)
    for method in METHODS:
        rows = initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method=method, teacher_lengths=lengths)
        assert torch.equal(rows[1], WEIGHT[5])
        assert torch.equal(rows[4], WEIGHT[0])


def test_half_precision_weights_are_averaged_in_float32():
    rows = initialize(WEIGHT.bfloat16(), 6, MATCHES, SUBTOKENS)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[3], WEIGHT[2].bfloat16().float())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"method: wanted one of mean, .* zero, or a function; got 'focus'"):
        initialize(WEIGHT, 6, MATCHES, SUBTOKENS, method="focus")
    with pytest.raises(ValueError, match=r"teacher_weight: wanted a row for each teacher id up to 9, got 6 rows"):
        initialize(WEIGHT, 6, MATCHES, {0: [9]})


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_prepared_folder_are_taken_for_new_tokens_only(tmp_path, tied):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, tie_word_embeddings=tied)
    teacher_tokenizer = save_tiny_model(tmp_path / "teacher", config)
    prepared_config = LlamaConfig(**sizes, tie_word_embeddings=tied)
    save_tiny_model(tmp_path / "prepared", prepared_config, padding_rows=80)
    teacher = Teacher(tmp_path / "teacher").load(torch.float32)
    prepared = Teacher(tmp_path / "prepared").load(torch.float32)
    vocabulary = VocabularyPair(teacher_tokenizer, new_tokenizer(), 275)
    rows = initial_rows(teacher, vocabulary, tmp_path / "prepared", seed=0)
    file = {"input_embeddings": prepared.get_input_embeddings().weight.detach().clone()}
    if not tied:
        file["output_embeddings"] = prepared.lm_head.weight.detach().clone()
    save_file(file, tmp_path / "rows.safetensors")
    same = initial_rows(teacher, vocabulary, tmp_path / "rows.safetensors", seed=0)
    assert torch.equal(rows.input, same.input)
    assert tied or torch.equal(rows.output, same.output)
    assert (rows.output is None) == tied
    tables = [(rows.input, prepared.get_input_embeddings(), teacher.get_input_embeddings())]
    if not tied:
        tables.append((rows.output, prepared.lm_head, teacher.lm_head))
    for table, theirs, original in tables:
        for i in range(vocabulary.rows):
            match = vocabulary.matches.get(i)
            expected = theirs.weight[i] if match is None else original.weight[match.teacher_id]
            assert torch.equal(table[i], expected)


def test_a_folder_that_does_not_fit_or_does_not_exist(tmp_path):
    tokenizer = save_tiny_model(tmp_path / "teacher")
    teacher = Teacher(tmp_path / "teacher").load(torch.float32)
    vocabulary = VocabularyPair(tokenizer, new_tokenizer(), 275)
    with pytest.raises(ValueError, match=r"init: wanted input_embeddings with at least 330 rows .* got \(275, 32\)"):
        initial_rows(teacher, vocabulary, tmp_path / "teacher", seed=0)
    with pytest.raises(ValueError, match=r"init: wanted mean, .* omp-self, .* a model folder or a"):
        initial_rows(teacher, vocabulary, tmp_path / "nothing", seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_sparse_combinations_of_shared_rows(tmp_path, tied):
    """FOCUS and OMP: the same coefficients for both tables, shared rows as they are, the rest as the mean."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher_tokenizer = save_tiny_model(tmp_path / "teacher", LlamaConfig(**sizes, tie_word_embeddings=tied))
    student_tokenizer = new_tokenizer()
    donor_config = LlamaConfig(**sizes | {"hidden_size": 8}, vocab_size=len(student_tokenizer))
    donor = AutoModelForCausalLM.from_config(donor_config)
    donor.save_pretrained(tmp_path / "donor")
    student_tokenizer.save_pretrained(tmp_path / "donor")
    teacher = Teacher(tmp_path / "teacher").load(torch.float32)
    vocabulary = VocabularyPair(teacher_tokenizer, student_tokenizer, 275)
    shared = list(vocabulary.matches)
    new = [i for i in vocabulary.tokens if i not in vocabulary.matches]
    tables = [teacher.get_input_embeddings().weight] + ([] if tied else [teacher.lm_head.weight])
    occurs = torch.zeros(vocabulary.rows, dtype=torch.bool)
    occurs[fasttext_vectors(TEXTS, student_tokenizer).ids] = True
    for init in ("omp", "focus", "omp-self"):
        rows = initial_rows(teacher, vocabulary, init, seed=0, texts=TEXTS, donor=tmp_path / "donor")
        for table, weight in zip((rows.input, rows.output), tables, strict=False):
            assert torch.equal(table[shared], weight[[vocabulary.matches[i].teacher_id for i in shared]])
            assert table.isfinite().all()
        if init == "omp":  # 8 anchors span the donor's space: the combination gives the donor's row exactly
            vectors = donor.get_input_embeddings().weight.detach()
            coefficients = omp_coefficients(vectors[new], vectors[shared])
            torch.testing.assert_close(omp_apply(coefficients, vectors[shared]), vectors[new], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(rows.input[new], omp_apply(coefficients, rows.input[shared]))
        if init == "omp-self":  # no farther from the mean of the shared rows than these are in the middle
            made = sorted(rows.report.made)
            for table in (rows.input, rows.output)[: len(tables)]:
                anchors = table[[i for i in shared if bool(occurs[i])]]
                away, usual = (table[made] - anchors.mean(0)).norm(dim=1), (anchors - anchors.mean(0)).norm(dim=1)
                assert away.max() <= usual.median() * (1 + 1e-5)
        plain = initial_rows(teacher, vocabulary, "mean", seed=0)
        assert not torch.equal(rows.input[new], plain.input[new])
    with pytest.raises(ValueError, match="donor: wanted a model with the new vocabulary for init 'omp', got none"):
        initial_rows(teacher, vocabulary, "omp", seed=0)
    with pytest.raises(ValueError, match="donor: wanted a model with the new tokenizer's vocabulary"):
        initial_rows(teacher, vocabulary, "omp", seed=0, donor=tmp_path / "teacher")
    with pytest.raises(ValueError, match="texts: wanted text to train fastText on for init 'focus', got none"):
        initial_rows(teacher, vocabulary, "focus", seed=0)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """An untied teacher, a tokenizer for it, and a donor with that tokenizer whose tables are maps of its."""
    folder = tmp_path_factory.mktemp("untied")
    tokenizer = save_tiny_model(folder / "teacher", LlamaConfig(**SMALL, tie_word_embeddings=False))
    teacher, student = Teacher(folder / "teacher").load(torch.float32), new_tokenizer()
    vocabulary = VocabularyPair(tokenizer, student, 275)
    donor = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"hidden_size": 48}, vocab_size=len(student)))
    generator = torch.Generator().manual_seed(2)
    shared = [vocabulary.matches[i].teacher_id for i in vocabulary.matches]
    expected = []
    for theirs, ours in zip(
        (donor.get_input_embeddings(), donor.lm_head), (teacher.get_input_embeddings(), teacher.lm_head), strict=True
    ):
        mixing = torch.randn(32, 48, generator=generator)
        rows = torch.randn(len(student), 32, generator=generator)
        rows[list(vocabulary.matches)] = ours.weight.detach()[shared]
        theirs.weight.data = rows @ mixing + torch.randn(48, generator=generator)
        expected.append(rows)
    donor.save_pretrained(folder / "donor")
    student.save_pretrained(folder / "donor")
    return teacher, vocabulary, donor, folder / "donor", expected


def test_a_linear_map_finds_the_rows_of_a_linearly_related_donor(untied):
    """Input from the donor's input embedding, output from its head."""
    teacher, vocabulary, _, donor, expected = untied
    rows = initial_rows(teacher, vocabulary, "linear-map", 0, donor=donor)
    for found, wanted in zip((rows.input, rows.output), expected, strict=True):
        torch.testing.assert_close(found[vocabulary.new], wanted[vocabulary.new], rtol=1e-2, atol=2e-2)
    assert rows.report.initialized == len(vocabulary.new)


def test_the_ridge_is_the_one_that_leaves_tokens_out_best():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(30, 12, generator=generator, dtype=torch.float64) + 3
    target = source @ torch.randn(12, 5, generator=generator, dtype=torch.float64)
    target += 4 * torch.randn(30, 5, generator=generator, dtype=torch.float64)

    def fit(kept: list[int], ridge: float):
        middle, aim = source[kept].mean(0), target[kept].mean(0)
        left = source[kept] - middle
        slope = torch.linalg.solve(left.T @ left + ridge * torch.eye(12), left.T @ (target[kept] - aim))
        return lambda some: aim + (some - middle) @ slope

    centred = source - source.mean(0)
    ridges = [share * float((centred.T @ centred).trace()) / 12 for share in linear.RIDGES]
    errors = []
    for ridge in ridges:
        parts = [[j for j in range(30) if j != i] for i in range(30)]
        errors.append(
            sum(float((fit(kept, ridge)(source[i]) - target[i]).square().sum()) for i, kept in enumerate(parts))
        )
    expected = fit(list(range(30)), ridges[int(np.argmin(errors))])
    assert 0 < np.argmin(errors) < len(ridges) - 1
    some = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(linear.linear_map(source, target)(some), expected(some).float())


def test_omp_combines_output_rows_as_in_the_donors_head(untied):
    teacher, vocabulary, donor, folder, _ = untied
    shared, new = list(vocabulary.matches), vocabulary.new
    rows = initial_rows(teacher, vocabulary, "omp", 0, donor=folder)
    for table, theirs in ((rows.input, donor.get_input_embeddings()), (rows.output, donor.lm_head)):
        vectors = theirs.weight.detach()
        expected = omp_apply(omp_coefficients(vectors[new], vectors[shared]), table[shared])
        torch.testing.assert_close(table[new], expected, rtol=1e-3, atol=1e-4)
    few = initial_rows(teacher, vocabulary, "omp", 0, donor=folder, omp_k=3)
    vectors = donor.get_input_embeddings().weight.detach()
    expected = omp_apply(omp_coefficients(vectors[new], vectors[shared], 3), few.input[shared])
    torch.testing.assert_close(few.input[new], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init_head", ["first-piece", "zero", "omp", "linear-map", "boundary"])
@pytest.mark.parametrize("init", ["last-piece", "contextual"])
def test_an_untied_head_starts_by_a_rule_of_its_own(untied, init, init_head):
    teacher, vocabulary, _, donor, _ = untied
    given = {"texts": TEXTS, "donor": donor}
    rows = initial_rows(teacher, vocabulary, init, 0, init_head=init_head, **given)
    alone = initial_rows(teacher, vocabulary, init, 0, **given)
    assert torch.equal(rows.input, alone.input)
    if init_head != "boundary":
        assert torch.equal(rows.output, initial_rows(teacher, vocabulary, init_head, 0, **given).output)
    assert not torch.equal(rows.output, alone.output) or init_head == "boundary"


def test_rules_of_the_head_that_cannot_be_are_named(untied, tmp_path):
    teacher, vocabulary, _, _, _ = untied
    for name in ("omp", "linear-map"):
        for given in ({"init": name}, {"init": "mean", "init_head": name}):
            with pytest.raises(ValueError, match=f"donor: wanted .* for {list(given)[-1]} '{name}', got"):
                initial_rows(teacher, vocabulary, seed=0, **given)
    with pytest.raises(ValueError, match=r"init_head: wanted one of same, .*, got 'composed'"):
        initial_rows(teacher, vocabulary, "mean", 0, init_head="composed")


def test_rows_of_padding_enter_no_mean_and_no_draw():
    """Rows that are no tokens', behind the tokens and between them, against a table that does not have them."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(40, 6, generator=generator)
    places = torch.tensor([i for i in range(45) if i not in (7, 20)][:40])
    padded = torch.full((60, 6), 100.0)
    padded[places] = tokens
    at = {i: int(place) for i, place in enumerate(places)}
    matches = {i: Match(i + 1, "bytes") for i in range(3)}
    subtokens = {3: [9, 30, 9]}
    moved = {i: Match(at[match.teacher_id], "bytes") for i, match in matches.items()}, {3: [at[9], at[30], at[9]]}
    for method in ("mean", "length-mean", "random", "zero"):
        lengths = {i: i % 3 + 1 for i in range(40)}
        expected = initialize(tokens, 9, matches, subtokens, method=method, teacher_lengths=lengths)
        lengths = {at[i]: length for i, length in lengths.items()}
        options = {"method": method, "teacher_lengths": lengths, "teacher_ids": [*at.values(), 1000]}
        assert torch.equal(initialize(padded, 9, *moved, **options), expected)
    mean = initialize(padded, 9, *moved, teacher_ids=at.values())[5]
    assert torch.allclose(mean, tokens.double().mean(0).float(), atol=1e-6)


def test_a_model_with_padding_rows_starts_new_tokens_from_its_tokens(tmp_path):
    tokenizer = save_tiny_model(tmp_path, LlamaConfig(**SMALL, tie_word_embeddings=False), padding_rows=50)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        table.data[len(tokenizer) :] = 100.0
    student = byte_level(TEXTS, 300, eos_token="<|nobody knows|>", mask_token="<|this|>")
    vocabulary = VocabularyPair(tokenizer, student, len(table))
    i = student.convert_tokens_to_ids("<|this|>")
    assert i not in vocabulary.matches
    assert i not in vocabulary.subtokens
    rows = initial_rows(model, vocabulary, "mean", 0)
    for found, table in ((rows.input, model.get_input_embeddings()), (rows.output, model.get_output_embeddings())):
        expected = table.weight[: len(tokenizer)].double().mean(0).float()
        assert torch.allclose(found[i], expected, atol=1e-6)
    assert initial_rows(model, vocabulary, "random", 0).input.abs().max() < 5


@pytest.mark.parametrize("init", ["contextual", "focus", "omp-self", "tokalign", "wechsel"])
def test_texts_that_are_none_or_empty_are_passed_over(tmp_path, init):
    save_tiny_model(tmp_path)
    source = Teacher(tmp_path)
    model = source.load(torch.float32)
    vocabulary = VocabularyPair(source.load_tokenizer(), new_tokenizer(), len(model.get_input_embeddings().weight))
    pairs = [("def self return", "def value return")] * 20 if init == "wechsel" else None
    texts = [None, *TEXTS[:5], "", " \n", None, *TEXTS[5:]]
    rows = [initial_rows(model, vocabulary, init, 0, texts=x, parallel=pairs).input for x in (texts, TEXTS)]
    assert torch.equal(*rows)
