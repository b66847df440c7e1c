"""Texts that the teacher writes around new tokens: how they are drawn, what counts, and a transfer with them."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from test_runs import Stop, files, stop_at  # noqa: F401, a fixture
from tiny import TEXTS, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM

from matt_fast import TrainingOptions, doctor, transfer
from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.snippets import Snippets, as_documents, make_snippets
from matt_fast.model import sampling
from matt_fast.model.sampling import continuations
from matt_fast.model.teacher import Teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny model, and its vocabulary beside a larger one."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = save_tiny_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), VocabularyPair(tokenizer, new_tokenizer(), 275)


def drawn(model, prompt, numbers, usable, ends, shortest, temperature=0.8, top_k=100, top_p=0.95):
    """The specification: no cache, no batch, no padding."""
    ids = list(prompt)
    for step, number in enumerate(numbers):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].double()
        scores[~usable] = -torch.inf
        if step < shortest:
            scores[list(ends)] = -torch.inf
        shares, order = (scores / temperature).sort(descending=True, stable=True)
        shares, order = shares[:top_k].softmax(0).numpy(), order[:top_k].tolist()
        kept = min(len(shares), 1 + int(np.searchsorted(np.cumsum(shares), top_p)))
        sums = np.cumsum(shares[:kept])
        token = order[int(np.searchsorted(sums, number * sums[-1], side="right"))]
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_tokens_are_drawn_as_specified_whatever_is_beside_them(teacher, monkeypatch):
    model, _ = teacher
    model.generation_config.repetition_penalty = 5.0  # the model's own options are no part of it
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 270, size).tolist() for size in (1, 9, 2, 5, 17, 3, 4)]
    numbers = generator.random((len(prompts), 11))
    numbers[0], numbers[1] = 0.0, np.nextafter(1.0, 0.0)
    usable = torch.arange(275) < 270
    usable[100:130] = False
    ends = range(200, 260)  # likely enough to come
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 3)
    found = continuations(model, prompts, numbers, usable, ends, shortest=2)
    assert found == [drawn(model, prompt, row, usable, ends, 2) for prompt, row in zip(prompts, numbers, strict=True)]
    assert len({len(row) for row in found}) > 1, "some end before others"
    assert model.generation_config.repetition_penalty == 5.0


def test_each_snippet_has_its_token(teacher):
    model, pair = teacher
    wanted = {i: 3 + i % 2 for i in pair.new}
    made = make_snippets(model, pair, wanted, 5, texts=TEXTS)
    counts = Counter(x.token for x in made.kept)
    assert all(counts[i] <= wanted[i] for i in wanted)
    assert len(counts) > 0.8 * len([i for i in wanted if pair.tokens[i].kind == "text"])
    assert not any(pair.tokens[i].kind == "special" for i in counts)
    for x in made.kept:
        assert x.token in pair.student(x.text, add_special_tokens=False)["input_ids"]
        assert not {"<bos>", "<eos>", "\N{REPLACEMENT CHARACTER}"} & {*x.text.split(), *x.text}
    words = {word for text in TEXTS for word in text.split()}
    opened = [x.text for x in made.kept if not x.text.startswith(pair.tokens[x.token].bytes.decode(errors="replace"))]
    assert len(opened) > len(made.kept) / 3
    assert all(text.split()[0] in words or text[0] == " " for text in opened)
    some = {i: wanted[i] for i in sorted(wanted)[::7]}
    again, other = (make_snippets(model, pair, some, seed, texts=TEXTS).kept for seed in (5, 6))
    assert again == [x for x in made.kept if x.token in some], "a token's snippets do not depend on the others"
    assert again != other
    documents = list(as_documents(made.kept, 250, 0))
    assert sorted(x.text for part in documents for x in part) == sorted(x.text for x in made.kept)
    assert len(documents) < len(made.kept) / 2
    assert all(len(part) == 1 or sum(x.length for x in part) <= 250 for part in documents)


def test_a_transfer_without_text_goes_on_to_the_same_bits(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name} | {"checkpoint_every": 2}
    given |= {"data": None, "snippets": 2, "training": TrainingOptions(objective="boundary-kl", steps=6, lr=1e-2)}
    messages = []
    whole = transfer(**given, output=tmp_path / "whole", on_message=messages.append)
    (line,) = [x for x in messages if x.startswith("snippets: ")]
    found = whole.snippets
    assert line.removeprefix("snippets: ") in (tmp_path / "whole" / "README.md").read_text()
    assert found.seldom == whole.new == found.enough + found.fewer + found.absent
    assert found.generated > 0
    assert whole.seen > 20
    rows = list(map(json.loads, (tmp_path / "whole" / "run" / "snippets" / "snippets.jsonl").open()))
    assert sum(len(row["tokens"]) for row in rows) == found.snippets
    counts = Counter(i for row in rows for i in new_tokenizer()(row["text"], add_special_tokens=False)["input_ids"])
    new = VocabularyPair(save_tiny_model(tmp_path / "again"), new_tokenizer(), 275).new
    assert found.enough <= sum(counts[i] >= 2 for i in new)  # a piece of a text may be left out of the chunks
    assert found.absent >= sum(counts[i] == 0 for i in new)
    with pytest.raises(Stop):
        transfer(**given, output=tmp_path / "parts", on_step=stop_at(3))
    again = transfer(**given, output=tmp_path / "parts", resume=True)
    assert (again.progress.losses, again.snippets) == (whole.progress.losses, found)
    parts, alone = (tmp_path / name / "model.safetensors" for name in ("parts", "whole"))
    assert parts.read_bytes() == alone.read_bytes()
    assert transfer(**given, output=tmp_path / "parts", resume=True).snippets == found
    with pytest.raises(ValueError, match="is finished and cannot go on with snippets: was 2, now 3"):
        transfer(**given | {"snippets": 3}, output=tmp_path / "parts", resume=True)


def test_snippets_are_mixed_into_the_text(files, tmp_path):  # noqa: F811
    """With the text in which they occur two times or more, tokens need no snippets; the others come with it."""
    given = {name: value for name, value in files.items() if "eval" not in name}
    given |= {"training": TrainingOptions(objective="aim", steps=1), "epochs": 1.0, "checkpoint_every": 1000}
    without = transfer(**given, output=tmp_path / "without")
    given |= {"snippets": 2, "per_token": 1, "batch_size": 1}
    messages = []
    result = transfer(**given, output=tmp_path / "with", on_message=messages.append)
    found = result.snippets
    assert 0 < found.seldom < result.new
    assert found.snippets > 0
    assert result.seen > without.seen
    (line,) = [x for x in messages if x.startswith("per_token: ")]
    assert int(line.split()[1]) == result.seen
    assert line.endswith(f"{found.absent} never")


def test_what_is_refused(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name} | {"output": tmp_path / "x"}
    for changed, message in (
        ({"data": None}, "data: wanted text to train on, got none; with snippets"),
        ({"snippets": 0}, "snippets: wanted at least 1, got 0"),
        ({"data": None, "snippets": 1, "init": "focus"}, "data: wanted text for init 'focus', got none"),
        (
            {"data": None, "snippets": 1, "init_head": "boundary"},
            "data: wanted text for init_head 'boundary', got none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(**given | changed)
    assert not (tmp_path / "x").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matt_fast.recipe.snippets.make_snippets", lambda *_, **__: Snippets([], 61, 99))
        with pytest.raises(ValueError, match="snippets: wanted text with new tokens from the teacher, got none for 61"):
            transfer(**given | {"data": None, "snippets": 1})
    shutil.rmtree(given["output"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "masked", True)
        with pytest.raises(ValueError, match="snippets: wanted a causal language model to write texts, got the masked"):
            transfer(**given | {"training": TrainingOptions(objective="aim"), "snippets": 1})
    del given["output"]
    found = {x.name: x.found for x in doctor(**given | {"data": None, "snippets": 3})}
    assert found["snippets"].startswith(
        "100% of 61 new tokens come fewer than 3 times in no text: the teacher writes 183"
    )
