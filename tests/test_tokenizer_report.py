"""What `tokenizer report` says of tokenizers, against counting by hand and against smaller tokenizers that are made."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from matplotlib import image
from tiny import TEXTS, byte_level
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from matt_fast.alignment.reachable import unreachable
from matt_fast.alignment.vocabulary import token_bytes
from matt_fast.cli import app
from matt_fast.tokenizers.report import PROBES, report
from matt_fast.tokenizers.savings import Merges
from matt_fast.tokenizers.savings_picture import savings_figure

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
HOSTILE = "\x1b[31m<script>$x^2$\u202e"


def backend_of(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def wrap(backend: dict) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))


def extended(base, merges, characters=()) -> PreTrainedTokenizerFast:
    """The tokenizer with characters and merges behind its own, and the entries that these make."""
    backend = backend_of(base)
    model = backend["model"]
    for entry in (*characters, *(left + right for left, right in merges)):
        model["vocab"].setdefault(entry, len(model["vocab"]))
    model["merges"] += [list(pair) for pair in merges]
    return wrap(backend)


def counts_of(tokenizer, texts):
    return Counter(i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def check_every_cut(base, merges, characters, texts):
    """Savings at each number of added tokens equal the counts of the tokenizer that has only these."""
    whole = extended(base, merges, characters)
    counts, size = counts_of(whole, texts), sum(len(text.encode()) for text in texts)
    found = Merges(base, whole).savings(counts, size)
    known = backend_of(base)["model"]["vocab"].keys()
    for number in range(len(found.tokens)):
        some, kept, seen = list(characters)[:number], [], set(list(characters)[:number])
        for left, right in merges if number >= len(characters) else ():
            if left + right not in known and left + right not in seen:
                if len(seen) == number:
                    break
                seen.add(left + right)
            kept.append((left, right))
        assert found.tokens[number] == counts_of(extended(base, kept, some), texts).total(), number
    assert len(seen) == number
    assert found.bytes_per_token[-1] == size / counts.total()
    for share in (0.5, 0.95, 1.0):
        saved = found.tokens[0] - found.tokens
        enough = found.added_for(share)
        assert saved[enough] >= share * saved[-1]
        assert enough == 0 or saved[enough - 1] < share * saved[-1]
    assert found.saved_by_last(3) == pytest.approx(1 - found.tokens[-1] / found.tokens[max(-4, -len(found.tokens))])


@pytest.mark.parametrize("seed", range(6))
def test_savings_are_those_of_smaller_tokenizers(seed):
    """Merges at random, with entries that are made in several ways, and parts that are made only later."""
    draw = random.Random(seed)
    base = byte_level(TEXTS, 275, **ROLES)
    entries = [x for x in base.get_vocab() if x not in ROLES.values()]
    common = sorted(entries, key=lambda x: "".join(TEXTS).replace(" ", "Ġ").count(x), reverse=True)[:40]
    merges, known = [], {tuple(x) for x in backend_of(base)["model"]["merges"]}
    while len(merges) < 25:
        pair = draw.choice(common), draw.choice(common)
        if pair not in known:
            known.add(pair)
            merges.append(pair)
            common.append("".join(pair))
    check_every_cut(base, merges, (), TEXTS[:10])


def test_savings_of_a_real_continuation():
    base, more = (byte_level(TEXTS, size, **ROLES) for size in (280, 330))
    first, merges = (backend_of(x)["model"]["merges"] for x in (base, more))
    check_every_cut(base, [tuple(x) for x in merges[len(first) :]], (), TEXTS)


def sentencepiece(entries, merges) -> PreTrainedTokenizerFast:
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *entries]
    model = models.BPE({x: i for i, x in enumerate(vocab)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_savings_of_characters_that_a_byte_fallback_spelled():
    base = sentencepiece([*"▁abcd", "ab"], [("a", "b")])
    merges = [("ж", "ы"), ("▁", "ж"), ("ab", "語"), ("ab", "c")]
    check_every_cut(base, merges, ("ж", "語", "ы"), ["ab жы ab語abc 語語 ж", "ыж日 abcd"])


def test_savings_where_an_added_merge_leads_to_old_ones():
    """Of "abcd" the first gives a, bc, d; with the merge of a and bc, which makes no new token, it gets further."""
    first = [("b", "c"), ("a", "b"), ("ab", "c"), ("abc", "d")]
    base = sentencepiece([*"▁abcdxyz", "bc", "ab", "abc", "abcd"], first)
    check_every_cut(base, [("x", "y"), ("a", "bc"), ("xy", "z")], (), ["abcd xyz", "abcdabc xy"])


def test_there_is_no_curve_where_merges_do_not_go_on():
    base = byte_level(TEXTS, 280, **ROLES)
    other = byte_level([text[::-1] for text in TEXTS], 300, **ROLES)
    pieces = wrap(backend_of(base) | {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.0]]}})
    for tokenizer, words in ((other, "merges, then more"), (pieces, "wanted BPE")):
        with pytest.raises(ValueError, match=words):
            Merges(base, tokenizer)
    backend = backend_of(extended(base, [("q", "q")]))
    backend["model"]["vocab"]["qqq"] = len(backend["model"]["vocab"])
    ids = {backend["model"]["vocab"]["qqq"]: 3}
    with pytest.raises(ValueError, match="merges that make its token 'qqq'"):
        Merges(base, wrap(backend)).savings(ids, 9)
    found = report({"one": base, "other": other}, {"text": TEXTS})
    assert found.tokenizers[1].added is None
    assert "merges, then more" in found.tokenizers[1].no_curve
    with pytest.raises(ValueError, match="wanted a tokenizer that adds tokens"):
        savings_figure(found)


def test_tokens_that_no_text_gives():
    base = byte_level(TEXTS, 280, **ROLES)
    assert unreachable(base) == []
    backend = backend_of(extended(base, [("a", "Ġ"), ("aĠ", "b"), ("q", "q")]))  # spaces begin words there
    vocab = backend["model"]["vocab"]
    for entry in ("zzqq", "Ãĥ"):  # no merges; the second a letter's half
        vocab[entry] = len(vocab)
    found = unreachable(wrap(backend))
    assert sorted(found) == sorted(vocab[x] for x in ("aĠ", "aĠb", "zzqq", "Ãĥ"))
    begins_words = sentencepiece([*"▁abc", "▁a", "▁ab"], [("▁", "a"), ("▁a", "b")])  # "a" only behind something
    assert unreachable(begins_words) == []


def test_figures_are_those_of_counting_by_hand():
    base = byte_level(TEXTS, 280, **ROLES)
    more = byte_level(TEXTS, 330, **ROLES)
    backend = backend_of(more)
    digits = {"type": "Digits", "individual_digits": True}
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, backend["pre_tokenizer"]]}
    backend["normalizer"] = {"type": "Lowercase"}
    lower = wrap(backend)
    texts = {"code": TEXTS, "shout": ["A LOUD LINE 2023\n", "", "quiet", "  \n"]}
    told = []
    found = report({"base": base, "more": more, "lower": lower}, texts, lambda *given: told.append(given))
    documents = {name: [x for x in part if x.strip()] for name, part in texts.items()}
    for row, tokenizer in zip(found.tokenizers, (base, more, lower), strict=True):
        seen = Counter()
        for name, part in documents.items():
            counts = counts_of(tokenizer, part)
            seen += counts
            figures = row.texts[name]
            size, characters = sum(len(x.encode()) for x in part), sum(map(len, part))
            assert (figures.bytes, figures.characters, figures.tokens) == (size, characters, counts.total())
            assert figures.bytes_per_token == size / counts.total()
            assert figures.characters_per_token == characters / counts.total()
            assert figures.speedup == counts_of(base, part).total() / counts.total()
        special = set(tokenizer.all_special_ids) if tokenizer is not lower else {0, 1, 2}
        assert row.special == len(special)
        assert row.unseen == len(set(tokenizer.get_vocab().values()) - special - seen.keys())
        assert row.shared == len(tokenizer.get_vocab().keys() & base.get_vocab().keys())
        assert row.new == len(tokenizer.get_vocab()) - row.shared
        assert row.missing == len(base.get_vocab()) - row.shared
        assert row.tokens == len(token_bytes(tokenizer))
    lost = {name: figures.not_restored for name, figures in found.tokenizers[2].texts.items()}
    assert lost == {"code": 0, "shout": 1}
    assert found.tokenizers[2].texts["shout"].example == ("A LOUD LINE 2023\n", "a loud line 2023\n")
    assert found.tokenizers[0].differences == {"digits": [], "spaces": []}
    for kind, differences in found.tokenizers[2].differences.items():
        expected = []
        for text in PROBES[kind]:
            cuts = [x(text, add_special_tokens=False)["input_ids"] for x in (base, lower)]
            words = [[x.convert_ids_to_tokens(i) for i in ids] for x, ids in zip((base, lower), cuts, strict=True)]
            if words[0] != words[1]:
                expected.append(text)
        assert [text for text, _, _ in differences] == expected
    assert found.curves["more"].keys() == texts.keys()
    assert found.tokenizers[1].added == found.tokenizers[1].new
    assert told[-1] == ("bytes", sum(len(x.encode()) for x in documents["shout"]), None)
    figure = savings_figure(found)
    curve = figure.axes[0].lines[0].get_xydata()
    assert curve[0].tolist() == [0, found.curves["more"]["code"].bytes_per_token[0]]
    assert curve[-1, 1] == found.tokenizers[1].texts["code"].bytes_per_token


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    base = byte_level(TEXTS, 280, **ROLES)
    base.save_pretrained(folder / "base")
    byte_level([*TEXTS, HOSTILE * 50], 380, **ROLES).save_pretrained(folder / "odd")
    byte_level(TEXTS, 330, **ROLES).save_pretrained(folder / "more")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "odd.txt").write_text(HOSTILE + "\nA")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["tokenizer", "report", *map(str, arguments)])


def test_the_command_prints_draws_and_gives_json(places):
    sides = [places / name for name in ("base", "odd", "more")]
    texts = [f"--data={places / 'text.jsonl'}", f"--by=o$d$={places / 'odd.txt'}"]
    printed = run(*sides, *texts, f"--output={places / 'curve.png'}")
    assert printed.exit_code == 0, printed.output
    assert not {"\x1b", "\u202e"} & set(printed.output)
    assert "expectation" in printed.output
    assert np.ptp(image.imread(places / "curve.png")) > 0.5
    machine = json.loads(run(*sides, *texts, "--json").stdout)
    names = [row["name"] for row in machine["tokenizers"]]
    assert names == ["base", "odd", "more"]
    assert (
        machine["tokenizers"][0]["texts"]["text"]["tokens"] == counts_of(byte_level(TEXTS, 280, **ROLES), TEXTS).total()
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "data: wanted text to tokenise, in --data or --by, got none"),
        (["--by=de"], "by: wanted NAME=TEXT with a name of its own, got 'de'"),
        (["--by=de=TEXT", "--by=de=TEXT"], "by: wanted NAME=TEXT with a name of its own"),
        (["--data=/nowhere/text.jsonl"], "data: wanted a file or folder that is there"),
        (["--data=EMPTY"], "text: wanted text, got none"),
        (["--data=TEXT", "--output=curve.pdf"], "output: wanted a file that ends in .png, .svg, got 'curve.pdf'"),
        (["--data=TEXT", "--output=/nowhere/curve.png"], "output: wanted a file in a folder that is there"),
        (["--data=TEXT", "./nowhere/"], "tokenizers: wanted a file or folder that is there"),
    ],
)
def test_what_the_command_refuses(places, more, words):
    (places / "empty.txt").write_text(" \n")
    more = [x.replace("TEXT", str(places / "text.jsonl")).replace("EMPTY", str(places / "empty.txt")) for x in more]
    refused = run(places / "base", *more)
    assert refused.exit_code == 1
    assert f"Error: {words}" in refused.stderr


def test_normalizers_that_compose_are_counted_as_not_restored():
    base = byte_level(TEXTS, 280, **ROLES)
    composing = wrap(backend_of(base))
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    found = report({"base": base, "composing": composing}, {"text": ["cafe\u0301 au lait"]})
    assert [row.texts["text"].not_restored for row in found.tokenizers] == [0, 1]
    assert found.tokenizers[1].texts["text"].example == ("cafe\u0301 au lait", "caf\u00e9 au lait")
