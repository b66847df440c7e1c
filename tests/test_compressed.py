"""Compressed texts are read as what is in them is, a little at a time; what is cut off or damaged is named."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from matt_fast.data import rows
from matt_fast.data.documents import read_documents
from matt_fast.data.parallel import read_pairs
from matt_fast.data.reading import check_texts, find_files, read_texts
from matt_fast.data.summary import check_readable, digest_files


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {
    ".gz": lambda content: gzip.compress(content, 1),
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstd,
}
TEXTS = ["one\ntwo", "日本語 \u2028 déjà", 'a "quoted" \\ line, with a comma\n' * 40, "\U0001f600"]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)
FORMS = {
    "a.jsonl": LINES,
    "b.JSON": json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False),
    "c.csv": "\ufeffn,text\r\n" + "".join('1,"{}"\r\n\r\n'.format(text.replace('"', '""')) for text in TEXTS),
}


@pytest.mark.parametrize("ending", PACK)
def test_every_format_in_every_compression(tmp_path, monkeypatch, ending):
    folder = tmp_path / "a [1] ü"
    folder.mkdir()
    for name, content in FORMS.items():
        (folder / f"{name}{ending.upper()}").write_bytes(PACK[ending](content.encode()))
    (folder / f"d.md{ending}").write_bytes(PACK[ending](b"#") + PACK[ending](" Über\r\n".encode()) + PACK[ending](b"x"))
    (folder / f"e.tar{ending}").write_bytes(b"an archive")
    (folder / f"e.parquet{ending}").write_bytes(b"not compressed so")
    expected = [*TEXTS * 3, "# Über\nx"]  # files may have several streams, one behind another
    for block in (1 << 20, 3):
        monkeypatch.setattr(rows, "BLOCK", block)
        assert [text for file in find_files(folder) for text in read_texts(file, "text")] == expected
    assert list(read_documents(folder)) == expected
    seen = []
    found = check_readable(folder, on_progress=lambda *state: seen.append(state))
    total = sum(file.stat().st_size for file in find_files(folder))
    assert seen[-1] == ("bytes", total, total)
    assert (found.documents, found.bytes) == (13, len("".join(expected).encode()))
    assert found.skipped == {f"files of another format ({ending})": 2}
    assert found.digest == digest_files(folder)
    file = find_files(folder)[0]
    assert digest_files(file) == digest_files(file.rename(folder / f"moved.JSONL{ending}")) != digest_files(folder)


@pytest.mark.parametrize("ending", PACK)
def test_what_is_cut_off_or_damaged_is_named(tmp_path, ending):
    packed = PACK[ending](LINES.encode() * 50)
    wanted = {".gz": "gzip"}.get(ending, "zstd" if ending == ".zst" else ending[1:])
    file = tmp_path / f"a.jsonl{ending}"
    middle = len(packed) // 2
    for content in (
        packed[:-1],
        packed[:middle],
        packed + packed[:9],
        b"",
        packed + b"what is no stream",
        LINES.encode(),  # some clients unpack what they download, and keep the name
        packed[:middle] + bytes(x ^ 0xFF for x in packed[middle : middle + 8]) + packed[middle + 8 :],
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data: wanted a whole {wanted} file, got .+ in .*a.jsonl{ending}'"):
            check_readable(file)
        with pytest.raises(ValueError, match="wanted a whole"):
            list(read_documents(tmp_path))
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"eval_data: wanted a whole {wanted} file, got no bytes"):
        check_texts("eval_data", file)
    file.write_bytes(PACK[ending](LINES.encode() + b'{"text": 5}\n'))
    with pytest.raises(ValueError, match=rf"got 'text', which holds int in line 5 of .*a.jsonl{ending}'"):
        check_readable(file)
    with pytest.raises(ValueError, match=r"one of the columns \['text', 'n'\] of line 1 of .*, got 'body'"):
        check_texts("data", file, "body")
    file.write_bytes(PACK[ending](PACK[ending](LINES.encode())))
    with pytest.raises(ValueError, match=f"got what {wanted} compressed; what has a name that ends in .gz, .bz2"):
        check_readable(file)
    with pytest.raises(FileNotFoundError, match="data: wanted a file or folder that is there"):
        check_texts("data", f"gone.jsonl{ending}")


@pytest.mark.parametrize("ending", PACK)
def test_memory_does_not_grow_with_what_is_unpacked(tmp_path, monkeypatch, ending):
    file = tmp_path / f"a.txt{ending}"
    part, times = b"".join(b"line %d\n" % i for i in range(1 << 16)), 32  # 25 MB
    file.write_bytes(PACK[ending](part) * times)
    allocated = pa.total_allocated_bytes()
    tracemalloc.start()
    assert sum(len(text) for text in read_texts(file, "text")) == len(part) * times
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert pa.total_allocated_bytes() - allocated < 4 << 20
    monkeypatch.setattr(rows, "LONGEST_ROW", 1 << 20)
    for name, start in (("b.jsonl", b'{"text": "'), ("c.json", b'[\n{"text": "'), ("d.csv", b"text\n")):
        name += ending
        (tmp_path / name).write_bytes(PACK[ending](start + b"a" * (8 << 20)))
        with pytest.raises(ValueError, match=rf"wanted rows of less than 1,048,576 bytes, .* in line \d of .*{name}'"):
            list(read_texts(tmp_path / name, "text"))


def test_pairs_may_be_compressed(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"eins\tone\nzwei\tzwei\ttwo\n"))
    with pytest.raises(ValueError, match=r"parallel: wanted two columns in line 2 of .*a.tsv.gz'"):
        read_pairs(tmp_path / "a.tsv.gz")
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b'{"source": "eins", "target": "one"}\n'))
    assert read_pairs(tmp_path / "a.jsonl.zst") == [("eins", "one")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'a,text\n1,"x\ny"\n2\n',
            "data: wanted 2 values in line 4 of .*, one for each column .*, got 1",
        ),
        (b'a,text\n1,"x"y\n', "data: wanted CSV in line 2 of .*'a.csv', got what is none"),
        (b'a,text\n1,x\n2,"open\n\n', "data: wanted CSV in line 3 of .*'a.csv', got what is none"),
        (b"a,text\n1,caf\xe9\n", "data: wanted UTF-8 in line 2 of .*'a.csv', got the byte 0xe9"),
        (b"a;text\n1;x\n", r"text_field: wanted one of the columns \['a;text'\] of line 2 of"),
    ],
)
def test_bad_csv_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_readable("a.csv")
