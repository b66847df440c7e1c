"""`matt-fast evaluate` over several models: intervals, tasks of lm-evaluation-harness, completions and speed."""

import json
import math
import re
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import scipy.stats
import torch
from tiny import TEXTS, byte_level, jsonl, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, RecurrentGemmaConfig, RwkvConfig

from matt_fast.evaluation import tasks as task_module
from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.evaluation.completions import complete, first_words
from matt_fast.evaluation.intervals import bits_interval, ratio_interval
from matt_fast.evaluation.speed import measure_speed, passages
from matt_fast.evaluation.tasks import Score, TaskScore, compare
from matt_fast.recipe.completing import _body
from matt_fast.recipe.task_card import write_section
from matt_fast.support.installing import install_line

ROOT = Path(__file__).parents[1]
QUESTIONS = [json.loads(line) for line in (ROOT / "tests/tasks/everyday.jsonl").read_text().splitlines()]
PROMPTS = ["def function_alpha(self", "日本 return"]


run = partial(commands.run, "evaluate")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models: the original, one with other rows, and one with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "original")
    (folder / "held-out.jsonl").write_text(jsonl(TEXTS[:5]))
    (folder / "short.txt").write_text((TEXTS[2] * 4)[:1010])
    (folder / "long.txt").write_text(TEXTS[2] * 8)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    for seed, name in enumerate(("start", "adapted")):
        tokenizer = new_tokenizer() if name == "adapted" else AutoTokenizer.from_pretrained(folder / "original")
        model = AutoModelForCausalLM.from_pretrained(folder / "original")
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight.data.normal_(std=0.2)
        model.generation_config.update(do_sample=True, repetition_penalty=3.0, eos_token_id=None, max_length=20)
        model.generation_config.update(stop_strings=["e"], suppress_tokens=[*range(5, 200)], no_repeat_ngram_size=2)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def measured(models):
    """Everything at once; (the result, what was printed)."""
    (models / "adapted" / "README.md").write_text("---\ntags: [x]\n---\n\n# A model\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the task's file is found from there
        done = run(
            *(f"--model={models / name}" for name in ("original", "start", "adapted")),
            f"--data=code={models / 'held-out.jsonl'}",
            f"--data=long={models / 'long.txt'}",
            "--tasks=everyday",
            "--task-folder=tests/tasks",
            "--limit=8",
            "--batch-size=4",
            f"--card={models / 'adapted'}",
            f"--prompts={models / 'prompts.txt'}",
            f"--output={models / 'found.json'}",
            "--device=cpu",
        )
    assert done.exit_code == 0, done.output
    return json.loads((models / "found.json").read_text()), " ".join(done.stdout.split())


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_intervals_are_those_of_scipy():
    random = np.random.default_rng(3)
    pieces = [[n // 2, float(random.gamma(9, 90)), int(random.integers(300, 900))] for n in range(60)]
    others = [[n, bits * float(random.normal(1.05, 0.03)), size] for n, bits, size in pieces]
    found, other = (
        Evaluation(sum(b for _, b, _ in x) / sum(s for _, _, s in x), 3.0, 1, 1, 900, False, pieces=x)
        for x in (pieces, others)
    )
    bits, changed, sizes = (
        np.array([row[column] for row in rows]).reshape(30, 2).sum(1)
        for rows, column in ((pieces, 1), (others, 1), (pieces, 2))
    )
    options = {"paired": True, "method": "percentile", "n_resamples": 20_000, "rng": 1}
    over = lambda a, b, axis=-1: a.sum(axis) / b.sum(axis)  # noqa: E731
    for ours, theirs in (
        (bits_interval(found), scipy.stats.bootstrap((bits, sizes), over, **options)),
        (ratio_interval(other, found), scipy.stats.bootstrap((changed, bits), over, **options)),
    ):
        expected = theirs.confidence_interval
        assert (ours.units, ours.of, ours.few) == (30, "documents", False)
        width = expected.high - expected.low
        assert ours.low == pytest.approx(expected.low, abs=0.06 * width)
        assert ours.high == pytest.approx(expected.high, abs=0.06 * width)
    one = replace(found, pieces=[[0, bits, size] for _, bits, size in pieces[:3]])
    assert (bits_interval(one).units, bits_interval(one).of, bits_interval(one).few) == (3, "pieces", True)
    assert bits_interval(replace(found, pieces=pieces[:1])) is None
    with pytest.raises(ValueError, match="reference: wanted an evaluation on the same text"):
        ratio_interval(found, one)


def test_texts_of_several_models(measured):
    found, printed = measured
    assert list(found["models"]) == ["original", "start", "adapted"]
    for text, units, of in (("code", 5, "documents"), ("long", 3, "pieces")):
        scores = found["texts"][text]
        first = scores["original"]["evaluation"]["bits_per_byte"]
        for model in ("original", "start", "adapted"):
            bits, interval = scores[model]["evaluation"]["bits_per_byte"], scores[model]["interval"]
            assert interval["low"] <= bits <= interval["high"]
            assert (interval["units"], interval["of"]) == (units, of)
            assert f"{bits:.4f} ({interval['low']:.3f} to {interval['high']:.3f})" in printed
        assert scores["original"]["ratio"] is None
        assert scores["adapted"]["ratio"] == pytest.approx(scores["adapted"]["evaluation"]["bits_per_byte"] / first)
        between = scores["adapted"]["ratio_interval"]
        assert between["low"] <= scores["adapted"]["ratio"] <= between["high"]


def test_a_task_is_scored_as_by_hand(models, measured):
    (acc, acc_norm), printed = measured[0]["tasks"], measured[1]
    assert [(x["task"], x["metric"], x["n"], x["few_shot"]) for x in (acc, acc_norm)] == [
        ("everyday", "acc", 8, 0),
        ("everyday", "acc_norm", 8, 0),
    ]
    right = {}
    for name in ("original", "start", "adapted"):
        model, tokenizer = load(models / name)
        right[name] = []
        for question in QUESTIONS[:8]:
            context = tokenizer(f"Question: {question['question']}\nAnswer:")["input_ids"]
            nats = []
            for choice in question["choices"]:
                ids = tokenizer(f"Question: {question['question']}\nAnswer: {choice}")["input_ids"]
                with torch.no_grad():
                    logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                nats.append(sum(logs[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
            by_character = [x / len(choice) for x, choice in zip(nats, question["choices"], strict=True)]
            right[name].append([x.index(max(x)) == question["answer"] for x in (nats, by_character)])
    for index, row in enumerate((acc, acc_norm)):
        hits = {name: [float(each[index]) for each in rows] for name, rows in right.items()}
        means = {name: sum(each) / 8 for name, each in hits.items()}
        for name, each in hits.items():
            assert row["scores"][name]["value"] == pytest.approx(means[name])
            stderr = statistics.stdev(each) / math.sqrt(8)
            assert row["scores"][name]["stderr"] == pytest.approx(stderr)
            assert f"{means[name]:.4f} ± {stderr:.4f}" in printed
        for name in ("start", "adapted"):
            changes = [mine - first for mine, first in zip(hits[name], hits["original"], strict=True)]
            assert row["differences"][name]["value"] == pytest.approx(means[name] - means["original"])
            assert row["differences"][name]["stderr"] == pytest.approx(statistics.stdev(changes) / math.sqrt(8))


def test_the_share_of_the_gap():
    def row(value, higher=True):
        return [TaskScore("t", "m", 0, 2, higher, {"": Score(value, 0.1, [])})]

    (found,) = compare({"original": row(0.8), "start": row(0.3), "adapted": row(0.7), "other": row(0.2)})
    assert found.recovered == {"adapted": pytest.approx(0.8), "other": pytest.approx(-0.2)}
    assert found.differences["adapted"].value == pytest.approx(-0.1)
    assert found.differences["adapted"].stderr is None  # nothing is known of single questions
    (found,) = compare({"original": row(2.0, False), "start": row(6.0, False), "adapted": row(3.0, False)})
    assert found.recovered == {"adapted": pytest.approx(0.75)}
    (found,) = compare({"original": row(0.3), "start": row(0.3), "adapted": row(0.4)})
    assert found.recovered == {"adapted": None}  # there is no gap


def test_the_card_gets_one_section_of_tasks(models, measured):
    path = models / "adapted" / "README.md"
    card = path.read_text()
    assert card.startswith("---\ntags: [x]\n---\n\n# A model\n\n<!-- matt-fast: tasks -->\n## Tasks\n")
    score = measured[0]["tasks"][0]["scores"]["adapted"]["value"]
    assert re.search(rf"\| everyday \| acc \| 0 \| 8 \|.* {score:.4f} ±", card)
    path.write_text(card + "\n## Mine\n")
    write_section(path.parent, "## Tasks\n\nother\n")
    write_section(path.parent, "## Tasks\n\nother\n")
    begin, end = "<!-- matt-fast: tasks -->", "<!-- matt-fast: end of tasks -->"
    assert path.read_text() == f"---\ntags: [x]\n---\n\n# A model\n\n{begin}\n## Tasks\n\nother\n{end}\n\n## Mine\n"
    path.write_text(f"{begin}\n")
    with pytest.raises(ValueError, match="card: wanted '<!-- matt-fast: end of tasks -->'"):
        write_section(path.parent, "x")


def test_completions_are_greedy_and_equally_long(models, measured):
    rows = measured[0]["completions"]
    assert [row["prompt"] for row in rows] == PROMPTS
    original = AutoTokenizer.from_pretrained(models / "original")
    tokens = sum(len(original(x, add_special_tokens=False)["input_ids"]) for x in PROMPTS)
    n_bytes = round(40 * sum(len(x.encode()) for x in PROMPTS) / tokens)
    model, tokenizer = load(models / "adapted")  # whose generation settings ask for something else
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        begins = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).rstrip("\ufffd")
        assert row["written"]["adapted"].startswith(begins)
        assert n_bytes - 3 <= len(row["written"]["adapted"].encode()) <= n_bytes
        assert all(len(text.encode()) <= n_bytes for text in row["written"].values())  # others may end the text
    with pytest.raises(ValueError, match="prompts: wanted text, got ''"):
        complete(model, tokenizer, [""], 5)


def test_prompts_are_beginnings_of_documents():
    texts = ["One two three four", "  \n", "日本語日本語日本語", "One two three five", "x" * 200]
    assert first_words(texts, 3, 12) == ["One two", "日本語日", "x" * 12]
    assert first_words(["one two three\nfour five six\n" * 4], 2, 12) == ["one two", "four five"]


def test_speed_is_of_the_same_text_for_all(models):
    pairs = {name: load(models / name) for name in ("original", "adapted")}
    texts = [("def function_gamma(self", ", value=2):\n"), (TEXTS[2][:90], " 日本 +")]
    calls: list[tuple[str, list[int]]] = []
    seconds = iter(range(10**6))
    for name, (model, _) in pairs.items():
        model.register_forward_pre_hook(
            lambda _, __, given, name=name: calls.append((name, given["input_ids"][0].tolist())), with_kwargs=True
        )
    found = measure_speed(pairs, texts, rounds=2, clock=lambda: float(next(seconds)))
    for name, (model, tokenizer) in pairs.items():
        speed = found[name]
        read, written = (sum(len(x[part]) for x in texts) for part in (0, 1))
        assert speed.reading == [read / 2] * 2  # a second between two looks at the clock, for each text
        assert speed.writing == [written / 2] * 2
        assert speed.writing_ratio == [1.0, 1.0]
        fed = [ids for who, ids in calls if who == name]
        parts = [[tokenizer(part, add_special_tokens=False)["input_ids"] for part in text] for text in texts]
        once = [part for r, w in parts for part in ([tokenizer.bos_token_id, *r], *([x] for x in w))]
        assert fed == once * 3  # one round is not counted
        tokens = sum(len(part) for pair in parts for part in pair)
        assert speed.characters_per_token == pytest.approx((read + written) / tokens)
        cache = 2 * 3 * 2 * 8 * 4 * 1000 * tokens / (read + written)  # K and V, layers, heads, width, float32
        assert speed.cache_bytes == pytest.approx(cache)
        assert speed.embedding_bytes == model.get_input_embeddings().weight.numel() * 4  # tied
    turns = [name for name, ids in calls if len(ids) > 1]
    assert turns == ["adapted", "original"] * 2 + ["original", "adapted"] * 2 + ["adapted", "original"] * 2


@pytest.mark.parametrize("kind", ["state-space", "recurrent", "no way to go on"])
def test_speed_of_models_without_keys_and_values(kind):
    """The text is written as it is read at a stroke: the model goes on from what it remembers."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "eos_token_id": 1, "pad_token_id": 0}
    config = {
        "state-space": MambaConfig(**small, state_size=4),
        "recurrent": RwkvConfig(**small, context_length=64),
        "no way to go on": RecurrentGemmaConfig(**small | {"num_hidden_layers": 3}, num_attention_heads=2),
    }[kind]
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), byte_level(TEXTS, 290, eos_token="</s>")
    given, logits = [], []
    model.register_forward_pre_hook(lambda _, __, x: given.append(x["input_ids"]), with_kwargs=True)
    model.register_forward_hook(lambda _, __, found: logits.append(found.logits[0, -1]))
    texts = [("def function_gamma(self", ", value=2):\n")]
    if kind == "no way to go on":
        with pytest.raises(
            ValueError, match=r"speed: wanted a model that goes on from what it has read .*RecurrentGemma"
        ):
            measure_speed({"it": (model, tokenizer)}, texts, rounds=1)
        return
    found = measure_speed({"it": (model, tokenizer)}, texts, rounds=1)["it"]
    assert found.cache_bytes is None
    assert min(found.reading + found.writing) > 0
    ids = torch.cat(given[: len(given) // 2], 1)  # one round is not counted
    whole = model(input_ids=ids).logits[0]
    written = len(logits[: len(given) // 2])
    torch.testing.assert_close(torch.stack(logits[:written]), whole[-written:], rtol=1e-4, atol=1e-5)


def test_passages_are_equally_long():
    documents = [TEXTS[0], TEXTS[2] * 4, TEXTS[2] * 8]
    found = passages(documents, 2)
    assert [len("".join(x).encode()) for x in found] == [1000, 1000]
    assert all(read in documents[2] and written[0] == " " for read, written in found)
    assert passages(["日" * 700]) == [("日" * 266, "日" * 67)]  # no character is cut
    with pytest.raises(ValueError, match="data: wanted a document of 1,000 bytes"):
        passages(TEXTS[:2])


def test_speed_is_shown_and_in_json(models, monkeypatch):
    monkeypatch.setattr("matt_fast.evaluation.speed.WRITTEN", 20)
    done = run(f"--model={models / 'adapted'}", f"--data={models / 'short.txt'}", "--speed", "--json")
    assert done.exit_code == 0, done.output
    speed = json.loads(done.stdout)["speed"]["adapted"]
    assert len(speed["reading"]) == len(speed["writing"]) == 5
    assert f"{statistics.median(speed['writing']):,.1f}" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model=x"], "data, tasks, prompts: wanted at least one"),
        (["--model=x", "--data=a.txt"], "data: wanted a file"),
        (["--model=x", "--data=org/a", "--data=b=org/b"], "data: wanted NAME=TEXT"),
        (["--model=x", "--model=x", "--data=org/a"], "model: wanted another model each time"),
        (["--model=x", "--model=y", "--data=org/a", "--tokenizer=org/t"], "tokenizer: wanted one model"),
        (["--model=x", "--prompts=missing.txt"], "prompts: wanted a file that is there"),
        (["--model=x", "--prompts=Makefile"], "prompts: wanted .txt, .md, .jsonl"),
        (["--model=x", "--tasks=everyday", "--speed"], "speed: wanted text (data)"),
        (["--model=x", "--data=org/a", "--limit=3"], "limit: wanted tasks with it"),
        (["--model=x", "--data=org/a", "--chat-template"], "chat_template: wanted tasks with it"),
        (["--model=x", "--tasks= ,"], "tasks: wanted names"),
        (["--model=x", "--tasks=a", "--task-folder=missing"], "task_folder: wanted a folder"),
        (["--model=x", "--data=org/a", "--output=missing/x.json"], "output: wanted a file"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    done = run(*options)
    assert done.exit_code == 1
    assert words in " ".join(done.stderr.split())


def test_prompts_are_lines_or_rows(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("matt_fast.recipe.evaluating.evaluate_models", lambda **x: given.append(x["prompts"]) or 1 / 0)
    rows = [{"ask": "two\nlines"}, {"ask": None}, {"ask": " "}, {"ask": "ü"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lines.txt").write_bytes("\ufeffone\r\n\r\nü".encode())
    for name in ("rows.jsonl", "lines.txt"):
        run("--model=x", f"--prompts={tmp_path / name}", "--text-field=ask")
    assert given == [["two\nlines", "ü"], ["one", "ü"]]


def test_what_tasks_need_is_named(models, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = [f"--model={models / 'original'}", "--task-folder=tests/tasks", "--device=cpu"]
    tokenizer = AutoTokenizer.from_pretrained(models / "original")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template: wanted a tokenizer with a chat template"):
        task_module.Tasks(task_module.TaskOptions(("everyday",), chat_template=True, folder="tests/tasks")).run(
            SimpleNamespace(), tokenizer
        )
    monkeypatch.setattr(task_module, "find_spec", lambda name: None)
    done = run(*given, "--tasks=everyday")
    assert (done.exit_code, install_line("eval") in done.stderr) == (1, True)


def test_a_transfers_prompts_come_from_inside_of_its_documents():
    """They begin with titles and licences. A document of one line is taken from its beginning."""
    assert _body("title\nlicence\n\none\ntwo\nthree\nfour\n") == "\none\ntwo\nthree\nfour\n"
    assert _body("a line alone") == "a line alone"
