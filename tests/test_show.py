# ruff: noqa: RUF001 - look-alike characters are what is shown
"""Pictures of segments, influence and tokens: what they show, against transformers' own and sums by hand."""

import builtins
import io
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import image
from rich.console import Console
from tiny import TEXTS, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from matt_fast import TrainingOptions, transfer
from matt_fast.alignment.vocabulary import token_bytes
from matt_fast.cli import app
from matt_fast.cli.segments_display import print_segments
from matt_fast.cli.show_tokens import print_tokens
from matt_fast.show import segments_picture
from matt_fast.show.pieces import find_segments
from matt_fast.show.segments_page import segments_page
from matt_fast.show.segments_picture import segments_figure
from matt_fast.show.tokens import TokenRow
from matt_fast.support import plots
from matt_fast.support.printable import visible

TEXT = "def function_alpha(self, value=3):\n    return self.déjà + 日本 * 4  # end"
SHORT = "self.déjà + 日 4"
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e&amp;$x^2$\"'>\r\n\t\u0301é"
RIGHT_TO_LEFT = "العربية def שלום\n123"


def run(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished transfer in `adapted`, the model and tokenizer that it was made of beside it."""
    folder = tmp_path_factory.mktemp("show")
    save_tiny_model(folder / "teacher")
    new_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:9]))
    training = TrainingOptions(steps=6, lr=3e-2)
    places = [folder / name for name in ("teacher", "tokenizer", "corpus.jsonl", "adapted")]
    transfer(*places, max_length=48, batch_size=2, n_layers=2, training=training, on_message=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def sides(done):
    return [AutoTokenizer.from_pretrained(done / name) for name in ("teacher", "tokenizer")]


class Page(HTMLParser):
    """What a browser would see: names of elements, and texts by element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = Counter(), {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.mark.parametrize("text", [TEXT, HOSTILE, RIGHT_TO_LEFT, "x"])
def test_segments_have_the_text_and_the_tokens(sides, text):
    found = find_segments(text, *sides)
    assert "".join(x.text for x in found.segments) == text
    for side, tokenizer in zip(("old", "new"), sides, strict=True):
        pieces = [piece for x in found.segments for piece in getattr(x, side)]
        assert [piece.id for piece in pieces] == tokenizer(text, add_special_tokens=False)["input_ids"]
        shown = [piece.text for piece in pieces if not piece.text.startswith("‹")]
        assert "".join(shown).replace("◌", "") in visible(text) or len(shown) < len(pieces)
        tokens = token_bytes(tokenizer)
        for piece in pieces:
            if piece.text.startswith("‹"):
                assert bytes.fromhex(piece.text[1:-1]) == tokens[piece.id].bytes
    assert found.right_to_left == (text == RIGHT_TO_LEFT)
    assert sum(found.kinds.values()) == len(found.segments)
    # every segment is as short as can be: the two sides have no boundary in common inside
    for x in found.segments:
        ends = [{len(b"".join(token_bytes(t)[p.id].bytes for p in side[:n])) for n in range(1, len(side))}
                for t, side in zip(sides, (x.old, x.new), strict=True)]  # fmt: skip
        text_ends = {len(x.text[:n].encode()) for n in range(1, len(x.text))}
        assert not ends[0] & ends[1] & text_ends


def test_white_space_and_controls_are_seen():
    assert visible(" a\t\n\u00a0\u200b\x1b\u0301") == "␣a→⏎⍽\\u200b\\x1b\u0301"
    assert visible("\u0301a") == "◌\u0301a"


@pytest.mark.parametrize("text", [HOSTILE, RIGHT_TO_LEFT])
def test_a_page_has_no_markup_but_its_own(sides, text):
    found = find_segments(text, *sides)
    page = Page(segments_page(found, "<b>old</b>", "new & 'x'", "<i>"))
    assert page.elements["script"] == page.elements["i"] == 0
    assert page.elements["b"] == 2
    assert page.elements["bdi"] == sum(len(x.old) + len(x.new) for x in found.segments)
    assert page.texts["bdi"] == [piece.text for x in found.segments for side in (x.old, x.new) for piece in side]
    assert "<b>old</b>" in "".join(page.texts["b"])


@pytest.mark.parametrize("width", [20, 80])
def test_the_terminal_shows_tokens_above_each_other(sides, width):
    console = Console(width=width, record=True, file=io.StringIO())
    text = HOSTILE + TEXT + "x" * 90
    found = find_segments(text, *sides)
    print_segments(console, found)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert not {"\x1b", "\u202e", "\r", "\t"} & set("".join(lines))
    for label, side in (("old ", "old"), ("new ", "new")):
        shown = "".join(line.removeprefix(label) for line in lines if line.startswith(label))
        pieces = "".join("│".join(piece.text for piece in getattr(x, side)) for x in found.segments)
        assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", pieces)


@pytest.mark.parametrize("text", [(TEXT + "\n" + HOSTILE) * 3 + "x" * 300, RIGHT_TO_LEFT * 5])
def test_no_two_labels_of_a_picture_overlap(sides, monkeypatch, text):
    monkeypatch.setattr(segments_picture, "fonts_for", lambda texts: (plots.fonts_for(texts)[0], set()))
    figure = segments_figure(find_segments(text, *sides))
    renderer = figure.canvas.get_renderer()
    extents = [x.get_window_extent(renderer) for x in figure.texts if x.get_text().strip()]
    room = figure.bbox
    order = np.argsort([x.y0 for x in extents])
    for place, i in enumerate(order):
        one = extents[i]
        assert one.x0 >= -1
        assert one.x1 <= room.x1 + 1
        for j in order[place + 1 :]:
            other = extents[j]
            if other.y0 > one.y1:
                break
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            down = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert across < 1 or down < 1, (figure.texts[i].get_text(), figure.texts[j].get_text())


def test_pictures_are_refused_that_would_have_boxes_for_letters(done, sides, monkeypatch, tmp_path):
    monkeypatch.setattr(segments_picture, "fonts_for", lambda texts: (["DejaVu Sans"], {"本", "日"}))
    with pytest.raises(ValueError, match=r"output: wanted fonts that can draw 日 本 .*or write \.html"):
        segments_figure(find_segments(TEXT, *sides))
    assert plots.fonts_for(["abc é $", " "]) == (["DejaVu Sans"], set())
    assert plots.fonts_for(["a\U0010fffe"])[1] == {"\U0010fffe"}
    monkeypatch.setattr(plots, "_can_shape", lambda: False)
    assert plots.fonts_for(["aשא\u0915"])[1] == {"ש", "א", "\u0915"}
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refused = run("segments", "--old=a/b", "--new=a/b", "--text=x", f"--output={tmp_path / 'x.png'}")
    assert refused.exit_code == 1
    assert "pip install 'matplotlib>=" in " ".join(refused.stderr.split())


def influence_by_hand(model, ids, segments, layer):
    """s[i, j] of each head by transformers' own attention weights and values: [heads, m, m, d] float64."""
    values = []
    attention = model.model.layers[layer - 1].self_attn
    hook = attention.v_proj.register_forward_hook(lambda module, given, out: values.append(out))
    with torch.no_grad():
        weights = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions[layer - 1][0].double()
    hook.remove()
    heads, count = weights.shape[0], len(ids)
    value = values[0][0].double().view(count, -1, 8).repeat_interleave(heads * 8 // values[0].shape[-1], 1)
    m = max(segments) + 1
    states = torch.zeros(heads, m, m, 8, dtype=torch.float64)
    for i in range(m):
        reader = max(t for t in range(count) if segments[t] == i)
        for t in range(count):
            if segments[t] >= 0:
                states[:, i, segments[t]] += weights[:, reader, t, None] * value[t]
    return states


def test_influence_is_that_of_attention_weights_and_values(done, sides, tmp_path):
    teacher, adapted = (
        AutoModelForCausalLM.from_pretrained(done / x, attn_implementation="eager").eval()
        for x in ("teacher", "adapted")
    )
    found = find_segments(SHORT, *sides)
    ids, owners = [], []
    for name, tokenizer in zip(("old", "new"), sides, strict=True):  # the bos token in front is in no segment
        ids.append([tokenizer.bos_token_id, *tokenizer(SHORT, add_special_tokens=False)["input_ids"]])
        owners.append([-1, *(n for n, x in enumerate(found.segments) for _ in getattr(x, name))])
    theirs = influence_by_hand(teacher, ids[0], owners[0], 2)
    ours = influence_by_hand(adapted, ids[1], owners[1], 2)
    arguments = ["influence", f"--adapted={done / 'adapted'}", f"--text={SHORT}", "--json"]
    picture = tmp_path / "influence.png"
    for head in ("mean", "3"):
        which = slice(None) if head == "mean" else slice(int(head), int(head) + 1)
        printed = run(*arguments, f"--head={head}", *([f"--output={picture}"] if head == "mean" else []))
        assert printed.exit_code == 0, printed.output
        machine = json.loads(printed.stdout)
        assert machine["layer"] == 2
        for name, states in (("teacher", theirs), ("after", ours)):
            expected = states[which].norm(dim=-1).mean(0)
            np.testing.assert_allclose(machine["influence"][name], expected, atol=1e-5, rtol=1e-4)
        distance = (ours - theirs)[which].norm(dim=-1).mean(0)
        np.testing.assert_allclose(machine["distance"]["after"], distance, atol=1e-5, rtol=1e-4)
        pairs = len(distance) * (len(distance) + 1) / 2
        assert machine["mean_distance"]["after"] == pytest.approx(float(distance.sum()) / pairs, rel=1e-4)
    assert len(machine["segments"]) == len(found.segments)
    assert machine["influence"]["before"] != machine["influence"]["after"]
    assert np.ptp(image.imread(picture)[..., :3]) > 0.5
    long = run("influence", f"--model={done / 'teacher'}", f"--tokenizer={done / 'tokenizer'}", "--json",
               "--text=" + TEXTS[2] * 9, "--layer=1", "--init=zero")  # fmt: skip
    machine = json.loads(long.stdout)
    assert machine["left_out"] > 0
    assert list(machine["distance"]) == ["before"]


def test_tokens_moved_as_far_as_their_rows_differ(done, tmp_path):
    records = [json.loads(line) for line in (done / "adapted" / "token_provenance.jsonl").open()]
    tables = [AutoModelForCausalLM.from_pretrained(done / x).get_input_embeddings().weight.detach().double().numpy()
              for x in ("teacher", "adapted")]  # fmt: skip
    vocabulary = token_bytes(AutoTokenizer.from_pretrained(done / "teacher"))
    everything = json.loads(run("tokens", done / "adapted", "--json", "--sort=id").stdout)
    new = [x for x in records if x["start"] == "mean"]
    assert everything["new"] == sum(not x["start"].startswith(("copied", "no token")) for x in records)
    rows = {x["id"]: x for x in everything["tokens"]}
    assert list(rows) == sorted(rows)
    old = tables[0][sorted(vocabulary)]
    old = old / np.linalg.norm(old, axis=1, keepdims=True)
    for record in new:
        row, i = rows[record["id"]], record["id"]
        start = tables[0][record["teacher_ids"]].mean(0)
        assert row["moved"] == pytest.approx(np.linalg.norm(tables[1][i] - start), abs=1e-5)
        assert row["norm"] == pytest.approx(np.linalg.norm(tables[1][i]), rel=1e-5)
        assert row["seen"] == record["seen"]
        assert row["moved"] > 0 if record["seen"] else row["moved"] < 1e-6
        for name, vector in (("before", start), ("after", tables[1][i])):
            cosines = old @ vector / np.linalg.norm(vector)
            assert [x[1] for x in row[name]] == pytest.approx(np.sort(cosines)[::-1][:3].tolist(), abs=1e-5)
    assert any(row["seen"] for row in rows.values())
    found = json.loads(run("tokens", done / "adapted", "--json", "--search=return", "--limit=2").stdout)
    matching = [x for x in rows.values() if "return" in x["token"]]
    assert found["matching"] == len(matching) > 0
    expected = sorted(matching, key=lambda x: (-x["moved"], x["id"]))[:2]
    assert [x["id"] for x in found["tokens"]] == [x["id"] for x in expected]
    # where rows cannot be made again, what the transfer wrote down of them
    other = shutil.copytree(done / "adapted", tmp_path / "other")
    run_json = other / "run" / "run.json"
    run_json.write_text(run_json.read_text().replace('"init": "mean"', '"init": "focus"'))
    found = json.loads(run("tokens", other, "--json", "--sort=moved").stdout)
    assert "'focus' cannot be made again" in found["moved"]
    moved = {x["id"]: x["moved"] for x in found["tokens"]}
    assert moved == pytest.approx({i: x["moved"] for i, x in rows.items()}, rel=1e-3, abs=1e-5)
    assert list(moved.values()) == sorted(moved.values(), reverse=True)
    printed = run("tokens", done / "adapted", "--limit=3", f"--output={tmp_path / 'tokens.html'}")
    assert printed.exit_code == 0, printed.output
    page = Page((tmp_path / "tokens.html").read_text())
    written = json.loads(page.texts["script"][0])
    first = sorted(rows.values(), key=lambda x: (-x["moved"], x["id"]))[:3]
    assert written["id"] == [x["id"] for x in first]
    assert written["moved"] == pytest.approx([x["moved"] for x in first], rel=1e-3)


def test_tokens_of_another_model_than_the_one_that_was_begun_with_are_refused(done, tmp_path):
    """The original in place of a result that was trained on: it does not have the ids that the records name."""
    more = tmp_path / "more"
    shutil.copytree(done / "adapted", more)
    (more / "token_provenance.jsonl").write_text(
        "".join(
            json.dumps({"id": i, "start": "its own row", "teacher_ids": [i], "trained": True, "seen": 1}) + "\n"
            for i in (300, 301)
        )
    )
    found = run("tokens", more, f"--model={done / 'teacher'}")
    assert found.exit_code == 1
    assert "model: wanted the one that the transfer began with" in found.output.replace("\n", " ")
    assert run("tokens", more, f"--model={done / 'adapted'}").exit_code == 0


def test_tokens_on_a_narrow_terminal():
    """Figures and words do not fit beside each other: lines, nothing cut."""
    rows = [TokenRow(i, f"token{i}", "mean", ("to", "ken"), True, 2, 1.25, 0.5, 9.0, (("near", 0.25),), (("now", 0.5),))
            for i in (289, 290)]  # fmt: skip
    console = Console(file=io.StringIO(), width=40, force_terminal=False, force_jupyter=False)
    print_tokens(console, rows)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "token289"
    assert lines[1].startswith("  id: 289; seen: 2; norm: 1.250")
    assert "nearest now: now 0.50" in "\n".join(lines)
    assert max(map(len, lines)) <= 40


SIDES = "--old=TEACHER --new=TOKENIZER"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (f"segments {SIDES}", "text and file: wanted one of them, got neither"),
        (f"segments {SIDES} --text=x --file=TEXT", "text and file: wanted one of them, got both"),
        (f"segments {SIDES} --file=/nowhere.txt", "file: wanted a file that is there"),
        (f"segments {SIDES} --file=TEACHER/model.safetensors", "file: wanted .txt, .md, .jsonl"),
        (f"segments {SIDES} --text=x --output=x.pdf", "output: wanted a file that ends in .png, .svg, .html"),
        (f"segments {SIDES} --text=x --output=/nowhere/x.png", "output: wanted a file in a folder that is there"),
        ("segments --old=./nowhere/ --new=TOKENIZER --text=x", "old: wanted a file or folder that is there"),
        ("influence --text=x", "adapted: wanted the output of a transfer, or model and tokenizer"),
        ("influence --text=x --adapted=TEACHER/..", "adapted: wanted the output of a finished transfer"),
        ("influence --text=x --adapted=ADAPTED --head=4", "head: wanted 0 to 3 at this layer, or mean; got 4"),
        ("influence --text=x --adapted=ADAPTED --head=first", "head: wanted a number from 0, or mean"),
        ("influence --text=x --adapted=ADAPTED --tokenizer=TOKENIZER", "tokenizer: wanted none beside adapted"),
        ("influence --text=x --adapted=ADAPTED --layer=4", "layer: wanted 1 to 3"),
        ("influence --text=x --adapted=ADAPTED --layer=0", "layer: wanted at least 1"),
        ("influence --text=x --adapted=ADAPTED --init=focus", "init: wanted one of mean"),
        ("influence --text=x --adapted=ADAPTED --output=x.html", "output: wanted a file that ends in .png, .svg"),
        ("tokens TEACHER", "folder: wanted the output of a finished transfer, but"),
        ("tokens /nowhere", "folder: wanted the output of a finished transfer, got"),
        ("tokens ADAPTED --sort=name", "sort: wanted one of moved, seen"),
        ("tokens ADAPTED --limit=0", "limit: wanted at least 1"),
        ("tokens ADAPTED --table=both", "table: wanted one of input, output"),
        ("tokens DAMAGED", "folder: wanted an object with id, start"),
    ],
)
def test_what_the_commands_refuse(done, arguments, words):
    damaged = done / "damaged"
    damaged.mkdir(exist_ok=True)
    (damaged / "config.json").write_text("{}")
    (damaged / "token_provenance.jsonl").write_text('{"id": "1"}\n')
    (done / "text.txt").write_text("x")
    for name in ("teacher", "tokenizer", "adapted", "damaged"):
        arguments = arguments.replace(name.upper(), str(done / name))
    refused = run(*arguments.replace("TEXT", str(done / "text.txt")).split())
    assert refused.exit_code == 1
    assert f"Error: {words}" in refused.stderr


def _bits(folder, text):
    """(tokens, where each ends in the text, bits of each) under the model in a folder, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        scores = model(torch.tensor([[start, *given["input_ids"]]])).logits[0, :-1].double().log_softmax(-1)
    bits = [-float(scores[n, i]) / np.log(2) for n, i in enumerate(given["input_ids"])]
    return tokenizer.convert_ids_to_tokens(given["input_ids"]), [end for _, end in given["offset_mapping"]], bits


def test_loss_is_told_by_kind_of_segment(done, tmp_path):
    texts = TEXTS[9:12]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = done / "adapted", "--data", tmp_path / "held.jsonl", "--limit", 3
    ended = run("loss", *asked, "--json", "--quiet")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    old = set(AutoTokenizer.from_pretrained(done / "teacher").get_vocab())
    wanted, each = {}, {}
    for text in texts:
        sides = [_bits(done / name, text) for name in ("teacher", "adapted")]
        before, first, last = "same", [0, 0], 0
        for end in sorted(set(sides[0][1]) & set(sides[1][1])):
            upto = [max(n for n, x in enumerate(side[1], 1) if x == end) for side in sides]
            tokens, bits = zip(
                *((tuple(s[0][a:b]), sum(s[2][a:b])) for s, a, b in zip(sides, first, upto, strict=True)), strict=True
            )
            kind = "same" if before.startswith("same") else "same, behind a change"
            if not set(tokens[1]) <= old:
                kind = "new tokens"
            elif tokens[0] != tokens[1]:
                kind = "old tokens, split otherwise"
            sums = wanted.setdefault(kind, np.zeros(4))
            sums += (1, len(tokens[1]), *bits)
            each[tokens] = each.get(tokens, 0) + bits[1] - bits[0]
            before, first, last = kind, upto, end
        assert last == len(text)
    size = len("".join(texts).encode())
    assert found["n_bytes"] == size
    assert {x["kind"] for x in found["parts"] if x["segments"]} == set(wanted)
    assert len(wanted) >= 3
    for part in found["parts"]:
        segments, tokens, *bits = wanted.get(part["kind"], np.zeros(4))
        assert [part["segments"], part["tokens"]] == [segments, tokens]
        assert [part["original"], part["adapted"]] == pytest.approx([x / size for x in bits], rel=1e-4)
    assert found["adapted"] == pytest.approx(sum(x[3] for x in wanted.values()) / size, rel=1e-5)
    assert [x["difference"] for x in found["worst"]] == pytest.approx(
        sorted((x / size for x in each.values()), reverse=True)[:3], rel=1e-3
    )
    shown = run("loss", *asked)
    assert "all, bits per byte" in shown.output
    assert f"{found['adapted']:.4f}" in shown.output


def test_loss_wants_text_and_a_result(done, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for arguments, words in (
        ((done / "teacher", "--data", done / "corpus.jsonl"), "model: wanted the original model"),
        ((tmp_path, "--data", done / "corpus.jsonl"), "folder: wanted the output of a finished transfer"),
        ((done / "adapted", "--data", tmp_path / "empty.txt"), "wanted text"),
        ((done / "adapted", "--data", done / "corpus.jsonl", "--pieces", 0), "pieces: wanted"),
    ):
        ended = run("loss", *arguments)
        assert ended.exit_code == 1
        assert words in ended.stderr.replace("\n", " ")


def test_loss_of_a_piece_that_has_no_positions_is_refused(done, tmp_path):
    short = shutil.copytree(done / "teacher", tmp_path / "short")
    settings = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 8}
    (short / "config.json").write_text(json.dumps(settings))
    ended = run("loss", done / "adapted", "--data", done / "corpus.jsonl", "--model", short)
    assert ended.exit_code == 1
    assert "data: wanted pieces of text within the model's 8 positions" in " ".join(ended.stderr.split())
