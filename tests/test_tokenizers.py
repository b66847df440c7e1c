# ruff: noqa: RUF001 - look-alike characters are data
"""Tokenizers that are extended, merged, pruned and trained, against what a plain reading of their merges says."""

import io
import json
import sys
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
from rich.console import Console
from tiny import TEXTS, byte_level
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from typer.testing import CliRunner

from matt_fast.alignment.vocabulary import VocabularyPair, token_bytes
from matt_fast.cli import app
from matt_fast.cli.tokenizer import print_new_tokenizer
from matt_fast.model.tokenizer_files import load_tokenizer
from matt_fast.recipe.doctor.tokenizers import next_added
from matt_fast.tokenizers import check, extend, merge, prune, train
from matt_fast.tokenizers.source import read_source
from matt_fast.tokenizers.symbols import Symbols, count_words

TEMPLATE = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
UKRAINIAN = [
    "Перекладач текстів перекладає тексти, а тексти перекладені. Її їжак їсть їжу; 12 їжаків, 345 їжаків.\n" * 3,
    "The translator translates the texts  and the texts are translated.\n\n    def їжак(x):\n        return x\n",
]
LETTERS = [f"{x} " * 9 for x in sorted({x for text in UKRAINIAN for x in text if not x.isascii()})]
MESSAGES = [{"role": "user", "content": "Привіт,  їжаче!\n"}, {"role": "assistant", "content": "def f(): 12"}]


def like_llama3() -> PreTrainedTokenizerFast:
    """Byte-level, whole pre-tokens looked up first, added tokens behind the vocabulary."""
    tokenizer = byte_level(TEXTS, 300).backend_tokenizer
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(x, special=True) for x in ("<bos>", "<eos>", "<extra>")])
    tokenizer.add_tokens([AddedToken("[user]", normalized=False)])
    return with_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"))


def with_holes(**roles: str) -> dict:
    """The content of a tokenizer.json with 300 tokens, whose ids from 280 on are 7 more."""
    content = json.loads(byte_level(TEXTS, 300, **roles).backend_tokenizer.to_str())
    content["model"]["vocab"] = {entry: i + 7 * (i >= 280) for entry, i in content["model"]["vocab"].items()}
    return content


def like_llama2(prepend: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as transformers converts it: no pre-tokenizer, a byte fallback."""
    letters = [chr(i) for i in range(0x21, 0x7F)]
    merged = ["th", "the", "▁t", "▁the", "te", "an", "▁▁", "▁▁▁▁"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "t"),
        ("▁t", "he"),
        ("▁", "the"),
        ("t", "e"),
        ("a", "n"),
        ("▁", "▁"),
        ("▁▁", "▁▁"),
    ]
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, *merged, "he"]
    merges.insert(3, ("h", "e"))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in pieces[:3]])
    roles = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return with_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles))


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


BASES = {
    "byte-level": lambda: with_template(byte_level(TEXTS, 300, bos_token="<bos>", eos_token="<eos>")),
    "llama3": like_llama3,
    "llama2": like_llama2,
    "gemma": lambda: like_llama2(prepend=False),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in UKRAINIAN * 2), encoding="utf-8")
    return file


def reads_as(tokenizer, model: dict, entry: str) -> list[str]:
    """What merges make of an entry, applied one at a time, by rank and from the left: slow and plain."""
    ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    pieces = list(entry)
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, i = min(found)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def is_text(content: bytes) -> bool:
    return content.decode(errors="ignore").encode() == content


def assert_kept(made, base, texts):
    """Everything that was there is there, under its id, and does what it did."""
    old, new = base.get_vocab(), made.get_vocab()
    assert {entry: new.get(entry) for entry in old} == old
    added = set(new) - set(old)
    assert sorted(new[entry] for entry in added) == list(range(max(old.values()) + 1, max(new.values()) + 1))
    assert made.special_tokens_map == base.special_tokens_map
    before, after = (json.loads(x.backend_tokenizer.to_str()) for x in (base, made))
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "post_processor"):
        assert after[part] == before[part]
    assert after["model"]["merges"][: len(before["model"]["merges"])] == before["model"]["merges"]
    rendered = [x.apply_chat_template(MESSAGES, tokenize=False) for x in (made, base)]
    assert rendered[0] == rendered[1] != ""
    by_id = {i: entry for entry, i in new.items()}
    for text in texts:
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert made.decode(ids) == base.decode(base(text, add_special_tokens=False)["input_ids"])
        # a new token is old ones glued together: spelled by the old merges alone the text is the base's
        old_ids = base(text, add_special_tokens=False)["input_ids"]
        spelled = [
            [x.id for x in base.backend_tokenizer.model.tokenize(by_id[i])] if by_id[i] in added else [i] for i in ids
        ]
        assert [i for ids_of_one in spelled for i in ids_of_one] == old_ids
        assert len(ids) < len(old_ids)
    for entry in added:
        if len(entry) > 1:
            assert reads_as(made, after["model"], entry) == [entry]
    return added


@pytest.mark.parametrize("name", BASES)
def test_extended_by_data_and_words(name, data, tmp_path):
    base = BASES[name]()
    words = tmp_path / "words.txt"
    words.write_text("їжаків\n translated\nпо-перше\nthe\n", encoding="utf-8")
    seen = []
    result = extend(base, tmp_path / "made", data=data, add=40, words=words, on_stage=seen.append)
    made = load_tokenizer(tmp_path / "made")
    added = assert_kept(made, base, UKRAINIAN)
    assert seen == ["tokenizer", "words", "data", "checks"]
    assert result.tokens == len(made) == result.before + len(added)
    assert len(result.added) == len(added)
    assert result.bytes_per_token > result.bytes_per_token_before
    spelled = {token.bytes.decode(errors="replace") for token in token_bytes(made).values()}
    assert {"їжаків", " їжаків", " translated"} <= spelled
    assert ("по-перше" in spelled) != ("по-перше" in result.left_out)
    pair = VocabularyPair(base, made, len(base))
    assert len(pair.matches) == len(base)
    assert pair.subtokens.keys() == {made.get_vocab()[entry] for entry in added}


def test_sentencepiece_stays_inside_words_and_gets_characters(data, tmp_path):
    extend(like_llama2(), tmp_path / "made", data=data, add=60)
    made = load_tokenizer(tmp_path / "made")
    added = set(made.get_vocab()) - set(like_llama2().get_vocab())
    assert {"ї", "е"} <= added  # spelled by three bytes before
    for entry in added:
        assert "▁" not in entry.lstrip("▁")
        assert entry.lstrip("▁").isalpha() or not any(map(str.isalpha, entry)), entry
        assert not set("0123456789") & set(entry)  # the base has each alone


def like_split() -> PreTrainedTokenizerFast:
    """Byte-level, cut by a pattern of its own, as Llama 3."""
    content = json.loads(byte_level(TEXTS, 280, eos_token="<eos>").backend_tokenizer.to_str())
    pattern = r"(?i:'s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] |= {"use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<eos>")


@pytest.mark.parametrize("base", [lambda: byte_level(TEXTS, 280, eos_token="<eos>"), like_split])
def test_words_with_vowel_signs_become_tokens(base, tmp_path):
    words = ["हिन्दी", "में", "किताबें", "पढ़ना", "ភាសាខ្មែរ", "ที่นี่"]
    text = "".join(f"{a} {b}, {a}\n" for a in words for b in words)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    told = extend(base(), tmp_path / "cut", data=tmp_path / "text.txt", add=400)
    letters = [unicodedata.category(x)[0] for x in text if unicodedata.category(x)[0] in "LM"]
    assert told.cut_at_marks == pytest.approx(letters.count("M") / len(letters))
    result = extend(base(), tmp_path / "made", data=tmp_path / "text.txt", add=400, join_marks=True)
    made = load_tokenizer(tmp_path / "made")
    assert set(words) | {" " + x for x in words} <= set(result.added)
    assert not set(words) & set(told.added)
    assert result.cut_at_marks == 0
    said = [io.StringIO(), io.StringIO()]
    for file, one in zip(said, (told, result), strict=True):
        print_new_tokenizer(Console(file=file, width=200), one)
    assert ["--join-marks" in x.getvalue() for x in said] == [True, False]
    assert result.bytes_per_token > 1.5 * told.bytes_per_token
    emoji = "I ❤️ it ❤️❤️, 🤷‍♀️!\ufe0f 1️⃣ ☎︎x \u0302"  # signs with marks
    for plain in (*TEXTS, *UKRAINIAN, "it's  12,345\n\n  x = y_1", emoji):  # no letter with a mark, no new token
        pieces = [x.backend_tokenizer.pre_tokenizer.pre_tokenize_str(plain) for x in (base(), made)]
        assert pieces[0] == pieces[1]
        assert made(plain)["input_ids"] == base()(plain)["input_ids"]
    old, new = (x.backend_tokenizer for x in (base(), made))
    by_id = {i: entry for entry, i in made.get_vocab().items()}
    spelled = [x.id for i in new.encode(text).ids for x in old.model.tokenize(by_id[i])]
    assert spelled == old.encode(text).ids


def test_trained_like_a_base_that_cuts_at_marks(tmp_path):
    words = ["हिन्दी", "किताबें", "पढ़ना", "ที่นี่"]
    (tmp_path / "text.txt").write_text("".join(f"{a} {b}\n" for a in words for b in words), encoding="utf-8")
    made = {}
    for join in (False, True):
        given = {"data": tmp_path / "text.txt", "size": 400, "like": like_split(), "join_marks": join}
        result = train(tmp_path / str(join), **given)
        made[join] = load_tokenizer(tmp_path / str(join))
        assert (result.cut_at_marks > 0.1) is not join
    tokens = {join: {x.decode([i]).strip() for i in range(len(x))} for join, x in made.items()}
    assert set(words) <= tokens[True]
    assert not set(words) & tokens[False]
    for plain in TEXTS:  # no marks in it
        pieces = [x.backend_tokenizer.pre_tokenizer.pre_tokenize_str(plain) for x in (like_split(), made[True])]
        assert pieces[0] == pieces[1]


def test_tokens_that_join_a_mark_and_a_sign_are_told(tmp_path):
    """Llama 3 has them: "\u094b\u0964", a vowel sign and the end of a sentence."""
    words = ["की।", "को,", "हिन्दी।", "में"]
    text = "".join(f"{a} {b} x\n" for a in words for b in words)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    base = byte_level([text], 340, eos_token="<eos>")  # GPT-2's pattern
    across = {x for x in map(base.decode, range(len(base))) if x in ("ी।", "ो,")}
    assert across == {"ी।", "ो,"}
    result = extend(base, tmp_path / "made", data=tmp_path / "text.txt", add=40, join_marks=True)
    assert across <= set(result.cut_tokens)
    assert all(unicodedata.category(x[0]) == "Mc" and x[1:].strip() in ("।", ",") for x in result.cut_tokens)
    made = load_tokenizer(tmp_path / "made")
    assert "की" in map(made.decode, made("की।", add_special_tokens=False)["input_ids"])
    used = {made.decode(i) for line in text.splitlines() for i in made(line)["input_ids"]}
    assert not used & set(result.cut_tokens)
    said = io.StringIO()
    print_new_tokenizer(Console(file=said, width=200), result)
    assert "ी।" in said.getvalue()
    assert made.decode(made(text)["input_ids"]) == text


def test_joined_marks_are_kept_where_transformers_takes_a_class_with_a_pattern_of_its_own(tmp_path):
    """No text that is looked at has tokens in it that would tell: the patterns do."""
    parts = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
    content = json.loads(byte_level(TEXTS, 280, eos_token="<eos>").backend_tokenizer.to_str())
    content |= {x: y for x, y in json.loads(Qwen2Tokenizer().backend_tokenizer.to_str()).items() if x in parts}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<eos>", "pad_token": "<eos>", "unk_token": None}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert type(load_tokenizer(tmp_path / "base")) is Qwen2Tokenizer
    (tmp_path / "other.txt").write_text("ที่นี่ " * 9, encoding="utf-8")
    train(tmp_path / "other", data=tmp_path / "other.txt", size=300)
    merge(tmp_path / "base", tmp_path / "other", tmp_path / "merged", join_marks=True)
    extend(tmp_path / "base", tmp_path / "extended", data=tmp_path / "other.txt", add=20, join_marks=True)
    for name in ("merged", "extended"):
        made = AutoTokenizer.from_pretrained(tmp_path / name)
        file = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        assert len(made("ที่นี่")["input_ids"]) == 1
        for text in ("ที่นี่ हिन्दी", *TEXTS):
            assert made(text)["input_ids"] == file.encode(text).ids
        assert made.eos_token == "<eos>"


def test_marks_that_cannot_be_joined_are_refused(tmp_path):
    content = json.loads(byte_level(TEXTS, 280, eos_token="<eos>").backend_tokenizer.to_str())
    content["pre_tokenizer"]["add_prefix_space"] = True
    base = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<eos>")
    with pytest.raises(ValueError, match="join_marks: wanted a pre-tokenizer with a pattern of letters"):
        extend(base, tmp_path / "made", words=["x"], join_marks=True)


@pytest.mark.parametrize("start", [280, 320])
def test_no_new_token_has_a_whole_character_and_a_part(start, tmp_path):
    text = "".join(f"{a}{b}は{a}、{b}가 {a}의 {b}đ{a}ộ{b}ớn" for a in "日本語漢字体" for b in "한국말글이다")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    base = byte_level([*TEXTS, text], start, eos_token="<eos>")
    result = extend(base, tmp_path / "made", data=tmp_path / "text.txt", add=150)
    made = load_tokenizer(tmp_path / "made")
    contents = [token.bytes for i, token in token_bytes(made).items() if i >= len(base)]
    parts = [x for x in contents if not is_text(x)]
    assert 0 < len(parts) < len(contents) == len(result.added)
    for content in parts:
        assert content.decode(errors="ignore").strip() == ""  # bytes of one character alone, a space in front at most
    assert {"日", "한"} <= {x.decode().strip() for x in contents if is_text(x)}
    assert max(map(len, result.added)) > 2  # and characters are put together
    extend(base, tmp_path / "words", words=["安定版", "언어"])
    contents = [token.bytes for i, token in token_bytes(load_tokenizer(tmp_path / "words")).items() if i >= len(base)]
    assert {"安定版".encode(), " 언어".encode()} <= set(contents)
    assert not any(x.decode(errors="ignore").strip() for x in contents if not is_text(x))


def test_words_that_occur_once_are_not_all_dropped(monkeypatch):
    """As in a language without spaces, where few pre-tokens come again."""
    monkeypatch.setattr("matt_fast.tokenizers.symbols.MOST_WORDS", 100)
    source = read_source(byte_level(TEXTS, 280, eos_token="<eos>"))
    once = [" " + "".join(chr(97 + (i * k) % 26) for k in (1, 3, 5, 7, 11)) + chr(97 + i // 26) for i in range(600)]
    words, _ = count_words(Symbols(source), [" twice twice" * 3, *once])
    assert 50 <= len(words) <= 100
    assert max(words.values()) == 6
    assert words.total() <= 6 + len(once)


def test_each_merge_is_of_a_most_frequent_pair(tmp_path):
    """Counted anew in the whole text behind each merge. The base has a token for each character."""
    base, file = byte_level([*TEXTS, *LETTERS], 420, eos_token="<eos>"), tmp_path / "text.txt"
    file.write_text("".join(UKRAINIAN), encoding="utf-8")
    extend(base, tmp_path / "made", data=file, add=40)
    content = json.loads(load_tokenizer(tmp_path / "made").backend_tokenizer.to_str())
    merges = content["model"]["merges"][len(json.loads(base.backend_tokenizer.to_str())["model"]["merges"]) :]
    assert len(merges) == 40
    encoding = base.backend_tokenizer.encode("".join(UKRAINIAN), add_special_tokens=False)
    words: list[list[str]] = []
    for i, token in enumerate(encoding.tokens):
        if i and encoding.word_ids[i] == encoding.word_ids[i - 1]:
            words[-1].append(token)
        else:
            words.append([token])
    known = set(base.get_vocab())
    for left, right in merges:
        counts = Counter(pair for word in words for pair in pairwise(word) if "".join(pair) not in known)
        overlapping = sum(a == b == c for word in words for a, b, c in zip(word, word[1:], word[2:], strict=False))
        assert counts[left, right] >= max(counts.values()) - overlapping
        known.add(left + right)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    word[i : i + 2] = [left + right]
                i += 1


@pytest.mark.parametrize("name", BASES)
def test_merged_with_another(name, data, tmp_path):
    base, file = BASES[name](), tmp_path / "text.txt"
    file.write_text("".join(UKRAINIAN) + "日旦旧旨早" * 4, encoding="utf-8")  # all begin with the same two bytes
    train(tmp_path / "other", data=file, size=420)
    other = load_tokenizer(tmp_path / "other")
    result = merge(base, other, tmp_path / "made")
    made = load_tokenizer(tmp_path / "made")
    assert_kept(made, base, UKRAINIAN)
    have = {token.bytes for token in token_bytes(made).values()}
    lacking = {token.bytes for token in token_bytes(other).values() if token.kind == "text"} - have
    assert {content.decode(errors="replace") for content in lacking} <= set(result.left_out)
    if name in ("llama2", "gemma"):  # parts of characters
        assert lacking
        assert not any(map(is_text, lacking))
    else:
        cut = base.backend_tokenizer.pre_tokenizer.pre_tokenize_str
        assert all(len(cut(content.decode())) > 1 for content in lacking)
    with pytest.raises(ValueError, match=r"^other: wanted a tokenizer with tokens that .* lacks"):
        merge(made, made, tmp_path / "again")


@pytest.mark.parametrize("name", ["byte-level", "llama3", "gemma"])
def test_pruned_by_use(name, data, tmp_path):
    base = BASES[name]()
    extend(base, tmp_path / "long", data=data, add=50)
    long = load_tokenizer(tmp_path / "long")
    result = prune(long, tmp_path / "short", keep=len(long) - 30, data=data)
    short = load_tokenizer(tmp_path / "short")
    assert result.tokens == len(short) == len(long) - 30 == len(result.removed) * -1 + len(long)
    assert sorted(short.get_vocab().values()) == list(range(len(short)))
    assert set(short.all_special_tokens) == set(long.all_special_tokens)
    assert [x("a")["input_ids"][0] == x.bos_token_id for x in (short, long)] == [name == "byte-level"] * 2
    rendered = [x.apply_chat_template(MESSAGES, tokenize=False) for x in (short, long)]
    assert rendered[0] == rendered[1]
    for text in UKRAINIAN:
        before, after = (x(text, add_special_tokens=False)["input_ids"] for x in (long, short))
        assert short.decode(after) == long.decode(before)
    # of the tokens that are parts of no other, none that stays is used less than one that went
    before, after = (Counter(token for text in UKRAINIAN * 2 for token in x.tokenize(text)) for x in (long, short))
    gone = set(long.get_vocab()) - set(short.get_vocab())
    assert all(len(entry) > 1 for entry in gone)
    parts = {part for pair in json.loads(short.backend_tokenizer.to_str())["model"]["merges"] for part in pair}
    ends = [x for x in short.get_vocab() if len(x) > 1 and x not in parts and x[0] not in "<["]
    assert max(before[x] for x in gone) <= min(after[x] for x in ends)
    with pytest.raises(ValueError, match=r"^keep: wanted at least the \d+ tokens that have to stay, got 9"):
        prune(long, tmp_path / "none", keep=9, data=data)


@pytest.mark.parametrize("kind", ["byte-bpe", "sentencepiece-bpe", "unigram"])
def test_trained_from_scratch(kind, data, tmp_path):
    result = train(tmp_path / "made", data=data, size=450, kind=kind)
    made = load_tokenizer(tmp_path / "made")
    assert 340 < result.tokens == len(made) <= 450
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<s>", "</s>", "<pad>")
    for text in (*UKRAINIAN, "日本語 ꙮ  \t\r\n x", " leading", "<0x41>"):
        assert made.decode(made(text)["input_ids"], skip_special_tokens=True) == text
    assert VocabularyPair(like_llama3(), made, 400).rows == len(made)
    assert not [x for x in made.get_vocab() if len(x) > 1 and any("0" <= c <= "9" for c in x) and x[:3] != "<0x"]


def test_trained_like_another(data, tmp_path):
    for name, make in BASES.items():
        base = make()
        train(tmp_path / name, data=data, size=420, like=base)
        made = load_tokenizer(tmp_path / name)
        assert set(base.all_special_tokens) == set(made.all_special_tokens)
        assert made.apply_chat_template(MESSAGES, tokenize=False) == base.apply_chat_template(MESSAGES, tokenize=False)
        before, after = (json.loads(x.backend_tokenizer.to_str()) for x in (base, made))
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            assert after[part] == before[part]
        assert len(made(UKRAINIAN[0])["input_ids"]) < len(base(UKRAINIAN[0])["input_ids"])
        assert len(made) <= 420


def test_what_cannot_be_done_is_refused(data, tmp_path):
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)))
    word_piece = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    for tokenizer, kind in ((unigram, "Unigram"), (word_piece, "WordPiece")):
        with pytest.raises(ValueError, match=f"^model: wanted a BPE tokenizer, whose merges can go on, got .* {kind}"):
            extend(tokenizer, tmp_path / "made", data=data)
    words = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(ValueError, match=r"^model: wanted BPE whose tokens are written alike .* '</w>'"):
        extend(PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "made", data=data)
    base, once, empty = like_llama3(), tmp_path / "once.txt", tmp_path / "empty.txt"
    once.write_text("ї", encoding="utf-8")
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match=r"^data: wanted text in which a pair of tokens occurs twice, got none in"):
        extend(base, tmp_path / "made", data=once)
    with pytest.raises(ValueError, match=r"^words: wanted a word a line in .*empty.txt', got none"):
        extend(base, tmp_path / "made", words=empty)
    with pytest.raises(ValueError, match=r"^words: wanted a .txt or .md file, got .*jsonl'"):
        extend(base, tmp_path / "made", words=data)
    with pytest.raises(ValueError, match=r"^data: wanted text to learn tokens from, or words, got neither"):
        extend(base, tmp_path / "made")
    with pytest.raises(ValueError, match=r"^size: wanted more than the 2\d\d of bytes and special tokens, got 9"):
        train(tmp_path / "made", data=data, size=9)
    with pytest.raises(ValueError, match=r"^keep: wanted fewer than the \d+ tokens that there are, got 9,999"):
        prune(base, tmp_path / "made", keep=9999, data=data)
    assert not (tmp_path / "made").exists()


def test_a_check_that_fails_leaves_no_folder(data, tmp_path, monkeypatch):
    base = like_llama3()
    extend(base, tmp_path / "sound", data=data, add=20)
    sound, new = load_tokenizer(tmp_path / "sound"), {}
    for broken, wanted in (
        (lambda x: x["model"]["merges"].pop(), "every new token to be reached"),
        (lambda x: x["model"]["merges"].__delitem__(slice(40)), "(the base's tokens|every new token)"),
        (lambda x: x["added_tokens"].pop(), "the added token"),
    ):
        content = json.loads(sound.backend_tokenizer.to_str())
        broken(content)
        loaded = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<bos>", eos_token="<eos>"
        )
        loaded.chat_template = TEMPLATE
        new = {x: i for x, i in sound.get_vocab().items() if x not in base.get_vocab()}
        with pytest.raises(ValueError, match=f"^output: wanted {wanted}"):
            check(loaded, read_source(base), UKRAINIAN, new=new)

    def fail(*given, **more):
        raise ValueError("output: wanted nothing, got this")

    monkeypatch.setattr(sys.modules["matt_fast.tokenizers.extend"], "check", fail)  # the name is the function
    with pytest.raises(ValueError, match="wanted nothing"):
        extend(base, tmp_path / "made", data=data, add=20)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["sound"]


def test_an_output_among_the_texts_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    inside = tmp_path / "texts" / "new"
    for make in (
        lambda given: train(inside, size=300, **given),
        lambda given: extend(like_llama3(), inside, **given),
        lambda given: prune(like_llama3(), inside, keep=300, **given),
    ):
        with pytest.raises(ValueError, match="output: wanted a folder outside of data"):
            make({"data": tmp_path / "texts"})
    assert not inside.exists()


def test_texts_that_are_longer_than_a_model_takes_are_no_warning(data, tmp_path, monkeypatch):
    """They are cut, or only counted; transformers tells of errors to come."""
    tokenizer = byte_level(TEXTS, 270)
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path / "base")
    told = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda text, *more: told.append(text))
    extend(tmp_path / "base", tmp_path / "new", data=data, add=4)
    load_tokenizer(tmp_path / "new")(TEXTS[0])
    assert told == []


def test_command_line(data, tmp_path):
    like_llama3().save_pretrained(tmp_path / "base")
    run = CliRunner().invoke
    base, out = str(tmp_path / "base"), str(tmp_path / "out")
    given = ["--model", base, "--data", str(data), "--output", out]
    found = run(app, ["tokenizer", "extend", *given, "--add", "7", "--json"])
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["added"]) == 7
    found = run(app, ["tokenizer", "extend", *given])
    assert found.exit_code == 1
    assert "Error: output: wanted a new or empty folder" in found.output
    for arguments, message in (
        (["extend", "--model", base, "--data", str(data), "--add", "0"], "add: wanted at least 1, got 0"),
        (["train", "--data", str(data), "--size", "500", "--kind", "x"], "kind: wanted one of byte-bpe"),
        (["prune", "--model", base, "--keep", "3", "--data", "no/such/file"], "data: wanted a file or folder"),
        (["merge", "--model", base, "--other", "/no/folder"], "other: wanted a file or folder"),
    ):
        found = run(app, ["tokenizer", *arguments, "--output", str(tmp_path / "new")])
        assert found.exit_code == 1
        assert message in found.output


def test_two_tokens_with_one_id_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, bad = byte_level(TEXTS, 300, eos_token="<eos>"), tmp_path / "bad.json"
    (tmp_path / "some.txt").write_text("some text")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(with_holes())))
    assert next_added(good) is None
    taken = next_added(tokenizer)
    assert taken[0] == 300 == tokenizer.get_vocab()[taken[1]]
    tokenizer.add_tokens(["Zürich", "Köln"])
    message = r"wanted tokens with ids of their own, got .*'Zürich' .*the id 300, and 1 more such ids\. Added"
    for refused, name in (
        (lambda: token_bytes(tokenizer), "tokenizer"),
        (lambda: VocabularyPair(good, tokenizer, 300), "tokenizer"),
        (lambda: VocabularyPair(tokenizer, good, 300), "teacher"),
        (lambda: extend(tokenizer, tmp_path / "out", words=["new"]), "model"),
        (lambda: prune(tokenizer, tmp_path / "out", keep=290, data="some.txt"), "model"),
        (lambda: merge(good, tokenizer, tmp_path / "out"), "other"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            refused()
    content, token = with_holes(), {"content": "<|x|>", "special": True, "id": 320}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append(token)
    bad.write_text(json.dumps(content))
    other = r"x: 1 of the added tokens of .*bad.json' have other ids than .* says, '<\|x\|>' has 300 for 320: added"
    with pytest.warns(UserWarning, match=other), pytest.raises(ValueError, match=r"^x: wanted tokens with ids"):
        load_tokenizer(bad, "x")
    content = json.loads(good.backend_tokenizer.to_str())
    content["added_tokens"].append(token)
    bad.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=other):
        assert load_tokenizer(bad, "x").convert_tokens_to_ids("<|x|>") == 300


def test_missing_ids_stay_missing(tmp_path):
    content = with_holes(eos_token="<eos>")
    content["model"]["vocab"]["<|x|>"] = 320
    base = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<eos>")
    base.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    made = extend(base, tmp_path / "made", words=["Zürich"])
    assert not made.left_out
    found = AutoTokenizer.from_pretrained(tmp_path / "made").get_vocab()
    assert {entry: found[entry] for entry in base.get_vocab()} == base.get_vocab()
    assert sorted(found.values()) == [*range(280), *range(287, 307), 320, *range(321, 321 + len(made.added))]
