"""Local data read to its end: what is wrong is named by file and line, what is right has the size that it has."""

import bz2
import errno
import gzip
import io
import json
import os
import re
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from matt_fast.data import documents, reading, rows, summary
from matt_fast.data.documents import read_documents
from matt_fast.data.parallel import read_pairs
from matt_fast.data.reading import check_texts, read_texts
from matt_fast.data.summary import WITHOUT_TEXT, check_held_out, check_readable, digest_files

TEXTS = ["one\r\ntwo", "日本語 \u2028 déjà", "", None, 'a "quoted" \\ line\n' * 40, "\U0001f600"]


def jsonl(path, texts=TEXTS, **options):
    path.write_text("".join(json.dumps({"n": 1, "text": text}, **options) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
def test_every_form_of_json_has_the_same_texts(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    made = [{"n": [1, {"text": "inner"}], "text": text, "x": -1.5e9, "y": True} for text in TEXTS]
    forms = {
        "lines.jsonl": "\n".join(map(json.dumps, made)),  # without an end of the last line
        "blank.json": "\n\n".join(json.dumps(row, ensure_ascii=False) + " \r" for row in made) + "\n\n",
        "list.json": json.dumps(made),
        "indented.json": json.dumps(made, indent=2, ensure_ascii=False) + "\n",
        "spanning.jsonl": "\n".join(json.dumps(row, indent=1) for row in made),
        "strings.json": json.dumps([text for text in TEXTS if text is not None]),
        "bom.jsonl": "\ufeff" + "\n".join(map(json.dumps, made)),
        "bom-list.json": "\ufeff" + json.dumps(made),
        "nothing.jsonl": "",
        "empty.json": " [ ] \n",
    }
    for name, form in forms.items():
        (tmp_path / name).write_bytes(form.encode())
        expected = [] if form.strip() in ("", "[ ]") else [t for t in TEXTS if t is not None or "strings" not in name]
        assert list(read_texts(tmp_path / name, "text")) == expected, name


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30)), st.integers(1, 40), st.sampled_from([None, 0, 3]), st.booleans())
def test_a_list_is_read_through_cuts_anywhere(tmp_path_factory, texts, block, indent, ascii_only):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps([{"text": t} for t in texts], indent=indent, ensure_ascii=ascii_only), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        assert list(read_texts(path, "text")) == texts


GOOD = b'{"text": "good"}\n'
BAD_ROWS = {
    b'{"text": "bad}\n': "data: wanted JSON in line 4 of",
    b'{"text": 1,}\n': "data: wanted JSON in line 4 of",
    b'{"text":"\xe9"}\n': "data: wanted UTF-8 in line 4 of .*, got the byte 0xe9",
    b'{"text": 5}\n': "text_field: wanted a column of texts, got 'text', which holds int in line 4 of",
    b'{"text": ["a"]}\n': "text_field: wanted a column of texts, got 'text', which holds list in line 4 of",
    b'{"body": "x"}\n': r"text_field: wanted one of the columns \['body'\] of line 4 of .*, got 'text'",
    b"[1, 2]\n": "data: wanted a row with columns in line 4 of",
    b'"text"\n': "data: wanted a row with columns in line 4 of",
    b"[" * 100_000 + b"\n": "data: wanted JSON in line 4 of .*maximum recursion depth exceeded",
    b'{"text": ' + b"[" * 100_000 + b"\n": "data: wanted JSON in line 4 of .*maximum recursion depth exceeded",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n": "data: wanted JSON in line 4 of .*digits",
    b"\0\0\n": "data: wanted JSON in line 4 of",
    b'{"text": "\\ud83d"}\n': r"data: wanted whole characters in line 4 of .*, got \\ud83d",
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.items())
def test_a_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "a[1].jsonl"
    path.write_bytes(GOOD * 2 + b"\n" + row + GOOD)
    with pytest.raises(ValueError, match=message) as error:
        check_readable(path)
    assert "a[1].jsonl'" in str(error.value)
    with pytest.raises(ValueError, match=message):
        list(read_documents(path))
    with pytest.raises(ValueError, match="eval_data: wanted" if message.startswith("data") else message):
        check_readable(tmp_path, argument="eval_data")


@pytest.mark.parametrize(
    ("content", "line", "got"),
    [
        ('[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]', 3, "{"),
        ('[\n{"text": "a"},\n{"text": }]', 3, "}]"),
        ('[\n{"text": "a"},\n\n', 4, "the end of the file"),
        ('[{"text": "a"}]\n\n{}', 3, "{"),
        ('{\n"text": "a"}\n{\n"text": tru}', 4, "tru}"),
    ],
)
@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_an_error_in_json_that_spans_lines_is_named(tmp_path, monkeypatch, content, line, got, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"wanted .* in line {line} of .*x.json', got '{got}"):
        check_readable(path)


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
def test_plain_text_is_one_document_with_its_lines_ended_alike(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes("日本\r\nzwei\rdrei\n".encode())
    assert list(read_documents(path)) == ["日本\nzwei\ndrei\n"] == [path.read_text()]
    found = check_readable(path)
    assert (found.documents, found.characters, found.bytes) == (1, 13, 17)
    path.write_bytes("日本\n\nx".encode() + b"\xe9\n")
    with pytest.raises(ValueError, match=r"data: wanted UTF-8 in line 3 of .*a.txt', got the byte 0xe9"):
        check_readable(path)
    path.write_bytes("日本\n".encode() + "日".encode()[:2])
    with pytest.raises(ValueError, match=r"data: wanted UTF-8 in line 2 of .*, got the byte 0xe6"):
        list(read_documents(path))


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
def test_byte_order_marks_are_no_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    for name, content in (("a.txt", "日\r\n"), ("b.md", ""), ("c.jsonl", '{"text": "x"}\n{"text": "y"}\r\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert list(read_documents(tmp_path)) == ["日\n", "", "x", "y"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_other_encodings_are_named(tmp_path, encoding, name):
    (tmp_path / name).write_bytes('{"text": "naïve"}\n'.encode(encoding))
    with pytest.raises(
        ValueError, match=rf"data: wanted UTF-8 in line 1 of .*{name}', got what looks like UTF-16 or 32"
    ):
        check_readable(tmp_path)


@pytest.mark.parametrize("name", ["long.txt", "LONG.MD"])
def test_a_long_text_comes_in_pieces(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading, "PIECE", 100)
    monkeypatch.setattr(rows, "BLOCK", 64)
    text = "".join(f"Zeile {i} — 日本\n" * (i % 3) + "ohne Ende " * (i == 7) * 30 for i in range(40))
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    pieces = list(read_documents(tmp_path / name))
    assert "".join(pieces) == text
    assert all(len(piece) <= 100 for piece in pieces)
    assert sum(not piece.endswith("\n") for piece in pieces) == 3  # in the line of 300 characters
    found = check_readable(tmp_path)
    assert (found.documents, found.characters, found.bytes) == (1, len(text), len(text.encode()))


def test_memory_does_not_grow_with_a_file(tmp_path):
    line = "Zeile für Zeile 日本\n"
    peaks = []
    for megabytes in (4, 16):
        (tmp_path / "a.txt").write_text(line * (megabytes * (1 << 20) // len(line.encode())))
        tracemalloc.start()
        for _ in read_texts(tmp_path / "a.txt", "text"):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 12 << 20


def test_parquet_of_every_type_of_text_and_its_bad_rows(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(reading, "ROWS_TOGETHER", 2)
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(TEXTS, pa.string()).cast(kind), "n": range(len(TEXTS))}), path)
        assert list(read_texts(path, "text")) == TEXTS
    with pytest.raises(ValueError, match=r"text_field: wanted one of the columns \['text', 'n'\] of .*, got 'body'"):
        check_readable(path, text_field="body")
    with pytest.raises(ValueError, match="got 'n', which holds int64"):
        check_readable(path, text_field="n")
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"fine", b"\xe9"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(ValueError, match=r"wanted UTF-8 in row 3 of .*a.parquet', got the byte 0xe9"):
        check_readable(path)
    pq.write_table(pa.table({"text": TEXTS}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"wanted a whole parquet file, got .* of .*a.parquet"):
        check_readable(path)


def test_names_are_no_patterns(tmp_path):
    for name, other in (("part[1].jsonl", "part1.jsonl"), ("what?.txt", "whats.txt"), ("a*.md", "ab.md")):
        for file, text in ((name, "MINE"), (other, "ANOTHER")):
            (tmp_path / file).write_text(json.dumps({"text": text}) if file.endswith("jsonl") else text)
        assert list(read_documents(tmp_path / name)) == ["MINE"]


def test_what_a_folder_holds(tmp_path):
    folder = tmp_path / "data[train]"
    (folder / "inner").mkdir(parents=True)
    jsonl(folder / "inner" / "a.jsonl", ensure_ascii=False)
    pq.write_table(pa.table({"text": TEXTS}), folder / "b.parquet")
    (folder / "c.md").write_text("c")
    seen = []
    found = check_readable(folder, on_progress=lambda *state: seen.append(state))
    texts = [text or "" for text in read_documents(folder)]
    assert Counter(texts) == Counter([text or "" for text in TEXTS] * 2 + ["c"])
    sizes = len(texts), len("".join(texts)), len("".join(texts).encode())
    assert (found.documents, found.characters, found.bytes) == sizes
    total = sum(file.stat().st_size for file in folder.rglob("*.*"))
    assert seen[-1] == ("bytes", total, total)
    assert found.digest == digest_files(folder)
    moved = folder.rename(tmp_path / "moved")
    assert check_readable(moved).digest == found.digest
    (moved / "c.md").write_text("d")
    changed = check_readable(moved).digest
    (moved / "c.md").rename(moved / "d.md")
    assert len({found.digest, changed, check_readable(moved).digest}) == 3


def test_what_is_passed_over_is_counted(tmp_path):
    folder = tmp_path / ".home" / "data"  # that a folder above is hidden does not matter
    for inner in (".cache", "x/.ipynb_checkpoints", "y"):
        (folder / inner).mkdir(parents=True)
    for hidden in (".cache/a.txt", "x/.ipynb_checkpoints/a.txt", "._b.jsonl", ".DS_Store"):
        (folder / hidden).write_bytes(b"\xff\xfe no text")
    for other in ("c.tsv", "d.tar.gz", "LICENSE"):
        (folder / other).write_text("other")
    jsonl(folder / "A.JSONL", ["one", None, "", " \n", "two"])
    pq.write_table(pa.table({"text": ["three", None]}), folder / "B.Parquet")
    (folder / "C.TXT").write_text("four")
    (folder / "y" / "empty.txt").write_text("")
    (folder / "y" / "empty.jsonl").write_text("")
    (folder / "back").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    found = check_readable(folder)
    assert found.skipped == {
        "hidden files": 4,
        "files of another format (.gz, .tsv, none)": 3,
        "pipes and devices": 1,
        "links to folders": 1,
        "documents without text": 5,
    }
    with pytest.raises(ValueError, match=r"wanted a file or folder with \.txt.*, which has 1 hidden files"):
        check_readable(folder / "x")
    assert found.documents == 9
    assert list(read_documents(folder)) == ["one", "", "", " \n", "two", "three", "", "four", ""]
    assert check_readable(folder / "C.TXT").skipped == {}
    assert list(read_documents(folder / ".cache" / ".." / "C.TXT")) == ["four"]
    (folder / ".named.txt").write_text("asked for")
    assert list(read_documents(folder / ".named.txt")) == ["asked for"]


def test_a_folder_that_datasets_saved(tmp_path):
    folder, both = tmp_path / "one", tmp_path / "both"
    saved = Dataset.from_dict({"n": range(5), "text": [text for text in TEXTS if text != ""]})
    saved.save_to_disk(folder, num_shards=2)
    found = check_readable(folder)
    assert list(read_documents(folder)) == [text or "" for text in saved["text"]]
    assert (found.documents, found.skipped) == (5, {"descriptions of a dataset": 2, WITHOUT_TEXT: 1})
    with_index = pa.ipc.new_file(tmp_path / "b.ARROW", saved.data.table.schema)
    with with_index:
        with_index.write_table(saved.data.table, max_chunksize=2)
    assert list(read_texts(tmp_path / "b.ARROW", "text")) == saved["text"][:]
    with pytest.raises(ValueError, match=r"text_field: wanted one of the columns \['n', 'text'\] of .*b.ARROW'"):
        check_texts("data", tmp_path / "b.ARROW", "body")
    with pytest.raises(ValueError, match="text_field: wanted a column of texts, got 'n', which holds int64 in"):
        check_texts("data", folder, "n")
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(next(folder.glob("*.arrow")).read_bytes()[:-99])
    with pytest.raises(ValueError, match=r"data: wanted a whole Arrow file, got .* after row 0 of .*cut.arrow'"):
        check_readable(cut)
    DatasetDict(train=saved, test=saved).save_to_disk(both)
    with pytest.raises(
        ValueError, match=r"by x: wanted one split, got .*both', .*; give one of .*both/test', .*/train'"
    ):
        check_texts("by x", both)
    assert check_readable(both / "test").documents == 5
    (tmp_path / "state.json").write_text('{"text": "no description"}')
    assert list(read_documents(tmp_path / "state.json")) == ["no description"]


def test_links_to_nothing_and_pointers_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.tsv").symlink_to(tmp_path / "gone.tsv")
    assert list(read_documents(tmp_path)) == ["text"]
    (tmp_path / "b.jsonl").symlink_to("../.annex/objects/b")
    with pytest.raises(
        FileNotFoundError, match=r"data: wanted a file, got the link .*b.jsonl' to '../.annex/objects/b'"
    ):
        read_documents(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.md").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"data: wanted the content of .*c.md', got a pointer of git-lfs"):
        check_readable(tmp_path)
    for name, packed in (("gzip", gzip.compress(b"text")), ("bz2", bz2.compress(b"text"))):
        (tmp_path / "c.md").write_bytes(packed)
        with pytest.raises(ValueError, match=rf"data: wanted text in .*c.md', got what {name} compressed; what has"):
            check_readable(tmp_path)


def test_what_is_no_file_of_text_or_cannot_be_read_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"data: wanted a file or folder, got .*pipe.txt', a pipe or device: text is"):
        check_readable(tmp_path / "pipe.txt")
    for column, wanted in (("text", "wanted one of the columns"), ("messages", "wanted a column of texts")):
        for name in ("chat.jsonl", "chat.parquet"):
            rows = [{"messages": [{"role": "user", "content": "x"}]}]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
            (tmp_path / "chat.jsonl").write_text(json.dumps(rows[0]))
            with pytest.raises(ValueError, match=rf"text_field: {wanted}.*{name}'.*; chats become texts by"):
                check_texts("data", tmp_path / name, column)
    for inside in ("closed", ".hidden"):
        (tmp_path / "some" / inside).mkdir(parents=True)
    (tmp_path / "some" / "a.txt").write_text("text")
    closed, scan, opened = {".hidden"}, os.scandir, io.open

    def refusing(real):
        def call(path, *given, **more):
            if Path(path).name in closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *given, **more)

        return call

    monkeypatch.setattr(os, "scandir", refusing(scan))  # whoever runs tests may be allowed everything
    monkeypatch.setattr(io, "open", refusing(opened))
    assert list(read_documents(tmp_path / "some")) == ["text"]
    closed.add("closed")
    with pytest.raises(PermissionError, match=r"data: wanted a folder that can be read, got .*closed': Permission"):
        read_documents(tmp_path / "some")
    closed.add("a.txt")
    with pytest.raises(PermissionError, match=r"eval_data: wanted a file that can be read, got .*a.txt': Permission"):
        check_texts("eval_data", tmp_path / "some" / "a.txt")


def test_files_that_change_are_told(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    found = summary.LocalFiles(tmp_path)
    assert found.changes() == []
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("longer")
    (tmp_path / "d.txt").write_text("d")
    words = [("a", "is gone"), ("b", "has changed"), ("d", "is new")]
    assert found.changes() == [f"{str(tmp_path / name) + '.txt'!r} {what}" for name, what in words]
    assert summary.LocalFiles("org/dataset").changes() == summary.LocalFiles(None).changes() == []
    shutil.rmtree(tmp_path)
    assert len(found.changes()) == 3


def test_columns_that_differ_between_files_are_named(tmp_path):
    jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n')
    with pytest.raises(ValueError, match=r"text_field: wanted one of the columns \['body'\] of line 1 of .*b.jsonl'"):
        check_readable(tmp_path)
    pq.write_table(pa.table({"body": ["three"]}), tmp_path / "b.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "two", "more": [1]}\n{"text": "x", "more": "y"}\n')
    with pytest.raises(ValueError, match=r"text_field: wanted one of the columns \['body'\] of .*b.parquet'"):
        check_readable(tmp_path)


PAIRS = [("eins", "one"), ("zwei ", "two\u2028")]
BAD_PAIRS = {
    b"eins\tone\tuno\n": "wanted two columns in line 3 of",
    b"eins\n": "wanted two columns in line 3 of",
    b"caf\xe9\tcoffee\n": "wanted UTF-8 in line 3 of .*, got the byte 0xe9",
}
BAD_JSON_PAIRS = {
    b'{"source": "a"}\n': 'wanted texts "source" and "target" in line 3 of',
    b'{"source": "a", "target": 5}\n': 'wanted texts "source" and "target" in line 3 of',
    b"[" * 100_000 + b"\n": 'wanted texts "source" and "target" in line 3 of',
    b'{"source": "\\ud83d", "target": "b"}\n': "wanted whole characters in line 3 of",
    b'{"source": "\xe9", "target": "b"}\n': "wanted UTF-8 in line 3 of .*, got the byte 0xe9",
}


def test_pairs_of_texts(tmp_path):
    tsv, lines = tmp_path / "a.TSV", tmp_path / "a.JSONL"
    tsv.write_bytes("\ufeffeins\tone\r\n\nzwei \ttwo\u2028\n\tnothing\n".encode())
    lines.write_text(
        "".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in [*PAIRS, (None, "x"), ("y", "")])
    )
    long = "wort " * 40_000  # more than the csv module reads in a column
    assert read_pairs(tsv) == read_pairs(lines) == PAIRS
    tsv.write_text(f'{long}\tlong\nsay "no\tsag "nein\n')
    assert read_pairs(str(tsv)) == [(long, "long"), ('say "no', 'sag "nein')]
    tsv.write_text(" \tb\n")
    with pytest.raises(ValueError, match="parallel: wanted a pair with text on both sides, got none"):
        read_pairs(tsv)
    for name in ("a.csv", "nothing.tsv"):
        (tmp_path / "a.csv").write_text("a,b")
        with pytest.raises(ValueError, match=rf"parallel: wanted a \.tsv or \.jsonl file .*, got '.*{name}'"):
            read_pairs(tmp_path / name)


@pytest.mark.parametrize(("row", "message"), [*BAD_PAIRS.items(), *BAD_JSON_PAIRS.items()], ids=range(8))
def test_a_bad_pair_is_named(tmp_path, row, message):
    path = tmp_path / ("a.tsv" if row in BAD_PAIRS else "a.jsonl")
    good = b"eins\tone\n" if row in BAD_PAIRS else b'{"source": "eins", "target": "one"}\n'
    path.write_bytes(good + b"\n" + row + good)
    with pytest.raises(ValueError, match=f"parallel: {message}"):
        read_pairs(path)


def test_a_stream_that_holds_something_else_is_named(monkeypatch):
    rows = [{"text": "a"}, {"text": None}, {"text": 5}]
    monkeypatch.setattr(documents, "load_hub_documents", lambda *names, **options: rows)
    texts = iter(read_documents("some/name"))
    assert [next(texts), next(texts)] == ["a", ""]
    with pytest.raises(ValueError, match="text_field: wanted texts, got int in a row of 'some/name'"):
        next(texts)


def test_held_out_data_is_not_the_training_data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    mine, other = jsonl(folder / "a.jsonl"), jsonl(tmp_path / "other.jsonl", ["other"])
    (tmp_path / "copy.jsonl").write_bytes(mine.read_bytes())
    (tmp_path / "link.jsonl").symlink_to(mine)
    cases = [(mine, mine), (folder, mine), (mine, folder), (mine, tmp_path / "link.jsonl")]
    for data, held_out in cases:
        with pytest.raises(ValueError, match=r"eval_data: wanted text that is not trained on.*is also part of data"):
            check_held_out(check_readable(held_out), check_readable(data), held_out, data)
    copy = tmp_path / "copy.jsonl"
    warning = check_held_out(check_readable(copy), check_readable(folder), copy, folder)
    assert re.search(
        r"eval_data: .*copy.jsonl' has the content of .*a.jsonl': bits per byte are of text that is", warning
    )
    assert check_held_out(check_readable(other), check_readable(folder), other, folder) is None


def test_a_hub_dataset_is_looked_at_only(monkeypatch):
    rows = [f"text {i}" for i in range(1000)]
    asked = []

    def texts(name, split, text_field):
        asked.append((name, split, text_field))
        return iter(rows)

    monkeypatch.setattr(summary, "read_documents", texts)
    monkeypatch.setattr(summary, "hub_revision", lambda name: "0123abcd")
    found = check_readable("some/name", split="test", text_field="body")
    assert asked == [("some/name", "test", "body")]
    assert (found.documents, found.characters, found.revision) == (100, len("".join(rows[:100])), "0123abcd")
    rows[3] = 7
    with pytest.raises(ValueError, match="text_field: wanted texts, got int in row 4 of 'body' of 'some/name'"):
        check_readable("some/name", split="test", text_field="body")


def test_the_first_document_without_text_is_named(tmp_path):
    def found(name: str, content: str) -> str | None:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return check_readable(tmp_path).without_text

    assert found("a.jsonl", '{"text": "a"}\n{"text": "b"}\n') is None
    empty = '{"text": "a"}\n{"text": null}\n{"text": " "}\n'
    assert found("c.jsonl", empty) == f"document 2 of {str(tmp_path / 'c.jsonl')!r}"
    assert found("b.txt", " \n") == repr(str(tmp_path / "b.txt"))
