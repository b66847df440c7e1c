"""Texts that the teacher writes of its own: what a template gives, what is drawn, and a transfer that reads them."""

import itertools
import json
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_runs import Stop, files, stop_at  # noqa: F401, a fixture
from test_snippets import drawn
from tiny import TEXTS, byte_level, new_tokenizer, save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from matt_fast import HealingOptions, TrainingOptions, doctor, transfer
from matt_fast.alignment.vocabulary import Token, VocabularyPair
from matt_fast.data import rehearsal
from matt_fast.data.chunks import Side, sides_of
from matt_fast.data.epochs import count_rows
from matt_fast.data.positions import deal_anew
from matt_fast.data.prepared import open_chunks, prepare_once
from matt_fast.data.rehearsal import Template, lacking_tokens, own_texts, template_of
from matt_fast.data.stream import AlignedBatches
from matt_fast.model import sampling
from matt_fast.recipe.rehearsal import rehearsal_of
from matt_fast.recipe.result import Rehearsal
from matt_fast.runs.folder import Run

CHATML = (
    "{% if messages[0].role != 'system' %}<sys>be kind<end>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny model, and its vocabulary beside a larger one."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = save_tiny_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), VocabularyPair(tokenizer, new_tokenizer(), 275)


def test_what_is_around_a_question_and_an_answer():
    tokenizer = byte_level(TEXTS, 270, eos_token="<end>")
    assert template_of(tokenizer) is None
    tokenizer.chat_template = CHATML
    assert template_of(tokenizer) == Template("<sys>be kind<end><user>", "<end>\n<assistant><think>", "<end>\n")
    tokenizer.chat_template = CHATML.partition("{% if add")[0]  # no generation prompt
    assert template_of(tokenizer) == Template("<sys>be kind<end><user>", "<end>\n<assistant>", "<end>\n")
    for template, message in (
        ("{{ raise_exception('only systems') }}", "wanted a chat template that takes .* only systems"),
        ("{{ messages[0].content }}", "it has to show them once each"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "once each"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"rehearse: .*{message}"):
            template_of(tokenizer)
    bare = byte_level(TEXTS, 270)
    with pytest.raises(ValueError, match="a chat template, or with a token that begins or ends a text, got neither"):
        template_of(bare)


def test_what_stands_around_texts_that_are_no_special_tokens_and_thoughts_that_are(monkeypatch):
    """A template like Mistral's, whose marks are text, and a tokenizer that writes a space before each word."""
    backend = Tokenizer(models.BPE(byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<s>", "</s>", "<think>", "</think>", "<image>"]
    backend.train_from_iterator([string.printable], trainers.BpeTrainer(special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content[0].text }} [/INST]"
        "{% else %} {{ (m.content[0].text).split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    )
    assert template_of(tokenizer) == Template("<s>[INST] ", " [/INST]", "</s>")
    calls = []
    script = [["is it a dog? [/INST] yes", "a cat"], ["<think>it is</think> a dog.", "it is <think> a"]]

    def written(model, prompts, numbers, usable, ends, **given):
        calls.append(([tokenizer.decode(x) for x in prompts], tokenizer.convert_ids_to_tokens(ends)))
        ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in script[len(calls) - 1]]
        return [*ids[:1], (ids[1] * 100)[: numbers.shape[1]]] if len(calls) == 2 else ids  # the last one is cut off

    monkeypatch.setattr(rehearsal, "continuations", written)
    monkeypatch.setattr(rehearsal, "position_limit", lambda model: None)
    pair = VocabularyPair(tokenizer, new_tokenizer(), len(tokenizer))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[1, 4]))
    whole, cut = own_texts(model, pair, 2, 0)
    assert calls[0] == (["<s> [INST]"] * 2, special), "a space before the question is its own"
    assert calls[1][0] == ["<s> [INST] is it a dog? [/INST]", "<s> [INST] a cat [/INST]"]
    assert calls[1][1] == ["<s>", "</s>", "<think>", "<image>"], "of what the template names only what ends a text"
    assert whole == "<s>[INST] is it a dog? [/INST]<think> it is</think> a dog.</s>"
    assert cut.startswith("<s>[INST] a cat [/INST] it is")
    assert not cut.endswith("</s>")
    assert lacking_tokens(tokenizer, new_tokenizer()) == []
    assert lacking_tokens(tokenizer, byte_level(TEXTS, 270, bos_token="<s>")) == ["</s>"]


def test_lines_within_texts_are_no_ends_of_rows(tmp_path):
    run = Run(tmp_path)
    (run.path("rehearsal")).mkdir(parents=True)
    texts = ["a\u2028b\x85", "\r\n"]
    rows = [json.dumps({"text": x}, ensure_ascii=False) + "\n" for x in texts]
    (run.path("rehearsal") / "texts.jsonl").write_text("".join(rows), encoding="utf-8")
    assert rehearsal_of(run) == Rehearsal(2, 6)


def test_a_conversation_is_as_drawn_one_by_one(teacher, monkeypatch):
    """Against the specification without cache, batch and padding: a question, then its answer."""
    model, pair = teacher
    tokenizer = pair.teacher
    monkeypatch.setattr(rehearsal, "QUESTION", 5)
    monkeypatch.setattr(rehearsal, "ANSWER", 7)
    special = dict.fromkeys(range(60, 100), Token("special", b"x"))  # likely enough to come
    monkeypatch.setattr(pair, "teacher_tokens", pair.teacher_tokens | special)
    told = []
    texts = own_texts(model, pair, 40, 3, on_progress=lambda *progress: told.append(progress))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((40 * 5 // 12, 40), (40, 40))
    usable = torch.arange(275) < 270
    ends = [0, 1, 2, *special]

    def written(prompt, longest, *seed):
        numbers = np.random.default_rng([3, *seed]).random(longest)
        ids = drawn(
            model, tokenizer(prompt, add_special_tokens=False)["input_ids"], numbers, usable, ends, 0, 1.0, None, 0.95
        )
        text, broken, _ = tokenizer.decode(ids).partition("\N{REPLACEMENT CHARACTER}")
        return text, len(ids) < longest and not broken

    expected, ended = [], 0
    for i in range(40):
        question = next((q for n in range(4) if (q := written("<bos>", 5, i, n)[0].strip())), None)
        if question is None:
            continue
        asked = f"<bos>{question}<eos><bos>"
        answer, whole = written(asked, 7, i, 4)
        if answer.strip():
            expected.append(asked + (answer.rstrip() + "<eos>" if whole else answer))
            ended += whole
    assert texts == expected
    assert 0 < ended < len(texts), "one that was cut off does not end as if it were whole"
    some = own_texts(model, pair, 4, 3)
    assert some == texts[: len(some)], "a text does not depend on those beside it"
    assert some != own_texts(model, pair, 4, 4)


def test_a_model_without_template_writes_from_the_beginning(teacher, monkeypatch):
    model, pair = teacher
    monkeypatch.setattr(pair.teacher, "chat_template", None)
    numbers = np.random.default_rng([5, 0, 0]).random(rehearsal.QUESTION + rehearsal.ANSWER)
    ids = drawn(model, [pair.teacher.bos_token_id], numbers, torch.arange(275) < 270, [0, 1, 2], 0, 1.0, None, 0.95)
    (text,) = own_texts(model, pair, 1, 5)
    assert text == pair.teacher.decode(ids).partition("\N{REPLACEMENT CHARACTER}")[0]


def test_texts_that_a_model_has_no_positions_for_are_refused(teacher, monkeypatch):
    model, pair = teacher
    for template, needed in ((pair.teacher.chat_template, 212), (None, 209)):  # <bos><eos><bos><eos>, and <bos>
        monkeypatch.setattr(pair.teacher, "chat_template", template)
        monkeypatch.setattr(model.config, "max_position_embeddings", needed - 1)
        with pytest.raises(ValueError, match=f"rehearse: .* {needed} tokens, got {needed - 1} positions"):
            own_texts(model, pair, 1, 5)
        monkeypatch.setattr(model.config, "max_position_embeddings", needed)
        own_texts(model, pair, 1, 5)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, teacher):
    """Sides, a file of texts and the folder of its chunks, and that of three texts of the teacher's own."""
    folder, sides = tmp_path_factory.mktemp("prepared"), sides_of(teacher[1], 32)
    found = []
    for name, texts in (("text", [*TEXTS, ""]), ("own", [f"own {i} {x}" for i, x in enumerate(TEXTS[:3])])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
        found += [path, prepare_once(folder / "cache", path, *sides, split="train", text_field="text")]
    return sides, found[0], found[1], found[3]


def rows_of(batches) -> list[tuple[int, ...]]:
    """The student's ids of each chunk, in their order."""
    found = []
    for batch in batches:
        for ids, documents in zip(batch.student_ids, batch.student_documents, strict=True):
            found += [tuple(ids[documents == number].tolist()) for number in range(int(documents.max()) + 1)]
    return found


@pytest.mark.parametrize("ready", [False, True])
def test_one_chunk_in_five_is_the_teachers_own(prepared, ready):
    sides, file, folder, own = prepared
    given = {"seed": 4, "prepared": [folder] if ready else None, "batch_size": 3}
    theirs = [tuple(x) for x in open_chunks([own])["student_ids"]]
    count = len(theirs)
    steps, everyones = 5 * count, []
    for process in range(2):
        shares = given | {"process": process, "processes": 2}
        plain = rows_of(itertools.islice(AlignedBatches(file, *sides, **shares), steps))
        mixed = rows_of(itertools.islice(AlignedBatches(file, *sides, own=own, **shares), steps))
        assert [x for i, x in enumerate(mixed) if i % 5 != 4] == plain[: 4 * len(mixed) // 5]
        everyones.append(mixed[4::5])
    in_turn = list(itertools.chain(*zip(*everyones, strict=True)))
    assert len(in_turn) == 6 * count
    passes = [in_turn[i : i + count] for i in range(0, 6 * count, count)]
    assert all(sorted(x) == sorted(theirs) for x in passes)
    assert passes[0] != passes[1], "in another order"


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_among_the_teachers_own(prepared, packing):
    sides, file, _, own = prepared
    given = {"seed": 4, "batch_size": 2, "own": own, "packing": packing}
    whole = list(itertools.islice(AlignedBatches(file, *sides, **given), 25))
    for behind in (1, 2, 7, 12):  # without packing 2 begins with a chunk of the teacher's own, 4 ends with one
        rest = itertools.islice(AlignedBatches(file, *sides, start=whole[behind - 1].position, **given), 25 - behind)
        assert rows_of(rest) == rows_of(whole[behind:])
    positions = [
        list(itertools.islice(AlignedBatches(file, *sides, process=x, processes=3, **given), 20))[-1].position
        for x in range(3)
    ]
    done = sum(x.read for x in positions)
    for processes in (1, 2):
        assert {x.read for x in deal_anew(positions, processes)} == {-(-done // processes)}


def test_how_many_rows_a_pass_has(prepared):
    sides, file, folder, own = prepared
    chunks = len(open_chunks([folder]))
    given = {"seed": 4, "prepared": [folder], "own": own, "batch_size": 1}
    of_a_pass = itertools.takewhile(lambda x: x.position.epoch == 0, AlignedBatches(file, *sides, **given))
    assert len(list(of_a_pass)) == count_rows([folder], None, own) == chunks + chunks // 4
    limits = (64, 64)
    longer = [Side(x.name, x.tokenizer, x.rows, 64) for x in sides]
    packed = AlignedBatches(file, *longer, packing=True, **given)
    full = list(itertools.takewhile(lambda x: x.position.epoch == 0, packed))
    rows = len(full) + len(full[-1].position.open_rows())
    assert count_rows([folder], limits, own) == pytest.approx(rows, abs=2)


def test_a_transfer_goes_on_to_the_same_bits(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name} | {"checkpoint_every": 2}
    given |= {"rehearse": 3, "per_token": 1, "training": TrainingOptions(steps=0), "epochs": None, "max_length": 64}
    given |= {"healing": HealingOptions("lora", steps=6, objective="ntp")}
    messages = []
    whole = transfer(**given, output=tmp_path / "whole", on_message=messages.append)
    run = tmp_path / "whole" / "run"
    rows = [json.loads(line)["text"] for line in (run / "rehearsal" / "texts.jsonl").open()]
    assert (whole.rehearsal.texts, whole.rehearsal.characters) == (len(rows), sum(map(len, rows)))
    assert 0 < len(rows) <= 3
    assert all(row.startswith("<bos>") and "<eos>" in row for row in rows)
    (line,) = [x for x in messages if x.startswith("rehearsal: ")]
    assert line.removeprefix("rehearsal: ") in (tmp_path / "whole" / "README.md").read_text()
    assert f"One chunk in five is of {len(rows)} texts" in (tmp_path / "whole" / "report.html").read_text()
    with pytest.raises(Stop):
        transfer(**given, output=tmp_path / "parts", on_step=stop_at(3))
    again = transfer(**given, output=tmp_path / "parts", resume=True)
    assert (again.healing.progress.losses, again.rehearsal) == (whole.healing.progress.losses, whole.rehearsal)
    parts, alone = (tmp_path / name / "model.safetensors" for name in ("parts", "whole"))
    assert parts.read_bytes() == alone.read_bytes()
    assert transfer(**given, output=tmp_path / "parts", resume=True).rehearsal == whole.rehearsal
    with pytest.raises(ValueError, match="is finished and cannot go on with rehearse: was 3, now 6"):
        transfer(**given | {"rehearse": 6}, output=tmp_path / "parts", resume=True)
    on_the_fly = transfer(**given | {"per_token": None}, output=tmp_path / "on the fly")
    assert on_the_fly.rehearsal == whole.rehearsal
    assert "data" in whole.seconds.keys() - on_the_fly.seconds.keys(), "the text was not prepared"


@pytest.mark.parametrize("option", ["rehearse", "snippets"])
def test_a_run_that_stops_while_the_teacher_writes_goes_on_behind_what_is_written(
    option,
    files,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 2)
    generate, batches, stop_at_batch = sampling._generated, [], [0]

    def counted(model, prompts, *given):
        batches.append(prompts)
        if len(batches) == stop_at_batch[0]:
            raise Stop
        return generate(model, prompts, *given)

    monkeypatch.setattr(sampling, "_generated", counted)
    given = {name: value for name, value in files.items() if "eval" not in name} | {option: 5, "max_length": 64}
    given |= {"training": TrainingOptions(steps=1), "epochs": None, "completions": 0}
    transfer(**given, output=tmp_path / "whole")
    whole = batches[:]
    assert len(whole) > 5
    batches.clear()
    for number in (3, 1, 2):  # the batch that is not written to its end is made again
        stop_at_batch[0] = len(batches) + number
        with pytest.raises(Stop):
            transfer(**given, output=tmp_path / "parts", resume="auto")
    stop_at_batch[0] = 0
    transfer(**given, output=tmp_path / "parts", resume=True)
    assert [batch for at, batch in enumerate(batches) if at not in (2, 3, 5)] == whole
    assert not (tmp_path / "parts" / "run" / "drawn.jsonl").exists()
    name = {"rehearse": "rehearsal/texts.jsonl", "snippets": "snippets/snippets.jsonl"}[option]
    for file in ("model.safetensors", f"run/{name}"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_what_is_refused_or_told(files, tmp_path):  # noqa: F811
    given = {name: value for name, value in files.items() if "eval" not in name} | {"output": tmp_path / "x"}
    for changed, message in (
        ({"rehearse": -1}, "rehearse: wanted at least 0, got -1"),
        ({"rehearse": 1, "data": None}, "data: wanted text to train on, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(**given | changed)
    assert not (tmp_path / "x").exists()
    places = {name: given[name] for name in ("model", "tokenizer", "data")}
    line, lacking = [x.found for x in doctor(**places, rehearse=30) if x.name == "rehearsal"]
    assert lacking == "rehearse: the new tokenizer lacks '<bos>', '<eos>' of the chat template, and reads them as text"
    assert line == "the teacher writes 30 conversations of its own, of up to 208 tokens, 6,240 in all"
