"""What initialisers tell of their work: counts of rows, outliers, progress, and what is missing."""

import re
import sys

import pytest
import torch
from commands import run
from tiny import TEXTS, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.cli.display import OUTLIERS, report_lines
from matt_fast.initializers import INITS, METHODS, initial_rows
from matt_fast.initializers.choices import FROM_DONOR, PIECES
from matt_fast.initializers.report import InitReport, Outlier
from matt_fast.model.teacher import Teacher

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS = [(text.splitlines()[0], text.splitlines()[0]) for text in TEXTS]
POISONED = "Ġfunction"
SLOW = ("composed", "contextual", "focus", "omp", "omp-self")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, the new tokenizer beside a donor model, one token of which is poisoned, and a text."""
    folder = tmp_path_factory.mktemp("report")
    # Not tied: of a random model's tied table `contextual` may keep every row.
    save_tiny_model(folder / "teacher", LlamaConfig(**SIZES | {"hidden_size": 32}, tie_word_embeddings=False))
    save_tiny_model(folder / "tied")
    tokenizer = new_tokenizer()
    torch.manual_seed(1)
    donor = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=len(tokenizer)))
    donor.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(POISONED)] *= 1000
    donor.get_output_embeddings().weight.data[tokenizer.convert_tokens_to_ids(POISONED)] *= 1000
    donor.save_pretrained(folder / "donor")
    tokenizer.save_pretrained(folder / "donor")
    folder.joinpath("text.txt").write_text("\n".join(TEXTS))
    return folder


def load(folder):
    source = Teacher(folder)
    return source.load(torch.float32), VocabularyPair(source.load_tokenizer(), new_tokenizer(), 275)


@pytest.fixture(scope="module")
def pair(folder):
    return load(folder / "teacher")


@pytest.mark.parametrize("init", INITS)
def test_the_counts_add_up_to_the_vocabulary(pair, folder, init):
    model, vocabulary = pair
    calls = []
    rows = initial_rows(
        model,
        vocabulary,
        init,
        0,
        texts=TEXTS,
        donor=folder / "donor",
        parallel=PAIRS,
        on_progress=lambda *call: calls.append(call),
    )
    report = rows.report
    counts = report.shared, report.initialized, report.subtoken_mean, report.unspelled
    assert sum(counts) == len(vocabulary.tokens)
    assert min(counts) >= 0 < report.initialized
    assert report.shared == len(vocabulary.matches)
    assert (report.unseen is not None) == (init not in (*METHODS, *FROM_DONOR))
    assert 0 <= (report.unseen or 0) <= report.subtoken_mean
    if init in SLOW:
        assert calls[-1] == (report.initialized, report.initialized)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    else:
        assert calls == []
    if init in PIECES:  # <unk> alone has no spelling
        assert counts[2:] == (0, 1)
    if init in ("focus", "omp-self", "wechsel", "transtokenizers", "tokalign"):
        plain = initial_rows(model, vocabulary, "mean", 0).input
        assert (rows.input != plain).any(1).sum() <= report.initialized


def test_tokens_that_never_occur_are_counted(pair):
    model, vocabulary = pair
    never = [i for i in vocabulary.subtokens if "日本" in vocabulary.student.decode([i])]
    assert never
    texts = [text for text in TEXTS if "日本" not in text]
    seen = {i for ids in vocabulary.student(texts)["input_ids"] for i in ids}
    unseen = set(vocabulary.subtokens) - seen
    for init in ("focus", "omp-self", "contextual"):
        report = initial_rows(model, vocabulary, init, 0, texts=texts).report
        assert len(never) <= len(unseen) == report.unseen <= report.subtoken_mean


def test_several_heads_are_one_piece_of_work(tmp_path):
    tokenizer = save_tiny_model(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=False))
    vocabulary, calls = VocabularyPair(tokenizer, new_tokenizer(), 275), []
    model = Teacher(tmp_path).load(torch.float32)
    for init in ("focus", "omp-self"):
        calls.clear()
        initial_rows(model, vocabulary, init, 0, texts=TEXTS, on_progress=lambda *call: calls.append(call))
        assert [done == total for done, total in calls].count(True) == 1


@pytest.mark.parametrize("name", ["teacher", "tied"])
def test_a_poisoned_token_is_named(folder, name):
    model, vocabulary = load(folder / name)
    poisoned = POISONED.replace("Ġ", " ")
    assert vocabulary.student.convert_tokens_to_ids(POISONED) in vocabulary.subtokens
    found = initial_rows(model, vocabulary, "omp", 0, donor=folder / "donor").report.outliers
    assert found[0].token == poisoned
    assert found[0].coefficient_norm > 100 < found[0].row_norm
    assert found[0].output_row_norm is None if name == "tied" else found[0].output_row_norm > 100
    options = [f"--model={folder / name}", f"--tokenizer={folder / 'donor'}", f"--donor={folder / 'donor'}"]
    text = folder / "text.txt"
    compared = run("compare-inits", *options, f"--eval-data={text}", "--init=mean", "--init=omp", "--eval-pieces=1")
    output = folder / f"output-{name}"
    done = run(
        "transfer", *options, f"--data={text}", f"--output={output}", "--init=omp", "--steps=1", "--max-length=48"
    )
    for shown in (compared, done):
        assert shown.exit_code == 0, shown.output
        assert repr(poisoned) in shown.output
        assert f"{len(vocabulary.matches)} shared, " in shown.output
    assert "mean: " in compared.output
    assert "the worst" not in compared.output.split("omp: ")[0]


def test_only_the_worst_outliers_are_printed():
    outliers = tuple(Outlier(f"[t{i}]\n", 1e4, 2.5, 3.0) for i in range(9))
    lines = report_lines(InitReport(1200, 3, 7, 1, 4, outliers))
    assert "1,200 shared, 3 initialised" in lines[0]
    assert "7 left to their sub-tokens (4 of them never occur in the text), 1 without a spelling" in lines[0]
    assert lines[1].startswith("9 outliers")
    assert len(lines) == 2 + OUTLIERS
    assert r"'[t0]\n': coefficients' sum 1e+04" in lines[2]
    assert "output row" not in lines[2]
    untied = InitReport(1, 2, 3, 4, outliers=(Outlier("x", 1.0, 1.0, 1.0, 7.5),))
    assert "the row's 1, the output row's 7.5 times the median" in report_lines(untied)[2]
    assert len(report_lines(InitReport(1, 2, 3, 4))) == 1


@pytest.mark.parametrize("init", ["focus", "omp-self", "wechsel"])
def test_a_missing_package_is_named_on_the_command_line(folder, monkeypatch, init):
    monkeypatch.setitem(sys.modules, "fasttext_pybind", None)
    pairs = folder / "pairs.tsv"
    pairs.write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    options = [f"--model={folder / 'teacher'}", f"--tokenizer={folder / 'donor'}", f"--parallel={pairs}"]
    text = folder / "text.txt"
    compared = run("compare-inits", *options, f"--data={text}", f"--eval-data={text}", f"--init={init}")
    trained = run("transfer", *options, f"--data={text}", f"--output={folder / init}", f"--init={init}")
    for failed in (compared, trained):
        assert failed.exit_code == 1
        said = " ".join(failed.output.split())
        assert re.search("need fastText .*pip install .*fasttext>=", said)
        assert "Traceback" not in failed.output
        assert isinstance(failed.exception, SystemExit)
    assert not (folder / init).exists()
