"""The model card: whatever a name holds, the card has the same metadata, headings and lines, and the name as a text."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from matt_fast import TrainingOptions, TransferResult
from matt_fast.initializers import InitReport
from matt_fast.recipe.card import code, model_card
from matt_fast.support.printable import printable
from matt_fast.training.loop import Progress

NAMES = [
    "plain",
    "a`b``c",
    "`",
    "``` ",
    " spaces ",
    "<script>alert(1)</script>",
    "<!-- ",
    "[link](http://x)",
    "![image](http://x)",
    "http://x.org",
    "a\n# heading\n\n---\ntags: [x]",
    "a: b\nlicense: mit",
    "- list",
    "'\"{}[]#&*!|>%@",
    "| a | b |\n|---|---|",
    "&lt;b&gt;",
    "\\` \\",
    "\x1b[31mred",
    "\u202egnp.exe",
    "half \udcff",
    "日本語 🙂",
    "yes",
    "1:30",
    "x" * 200,
]


def result() -> TransferResult:
    progress = Progress(3, 0.5, [0.9, 0.5], {"aim": 0.5}, 300, 2.0)
    return TransferResult("out", 2, 5, 3, 0, InitReport(5, 3, 0, 0), 3, 2, progress, {}, {}, 1, 1)


def card(model="org/model", data="org/data", init="mean", attention="sdpa") -> str:
    return model_card(result(), model, data, init, True, TrainingOptions(attn_implementation=attention))


def parts(text: str) -> tuple[dict, list[str], list[str]]:
    """Metadata, the kinds of Markdown's tokens, and the names in code spans."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(found[2])
    inline = [token for block in blocks for token in block.children or ()]
    kinds = [token.type for token in (*blocks, *inline)]
    return yaml.safe_load(found[1]), kinds, [token.content for token in inline if token.type == "code_inline"]


def shown(name: str) -> str:
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_cannot_break_out(name):
    metadata, kinds, names = parts(card())
    found, its_kinds, its_names = parts(card(name, name, name, name))
    assert its_kinds == kinds
    assert found.keys() == metadata.keys()
    assert found["tags"] == metadata["tags"]
    assert found["base_model"].replace("\n", "\\n") == shown(name)
    old = {"org/model", "org/data", "mean", "sdpa"}
    assert its_names == [shown(name) if x in old else x for x in names]
    card(name, name, name, name).encode()


@given(st.text())
def test_any_name_is_one_code_span(name):
    (block,) = (x for x in MarkdownIt().parse(f"a {code(name)} b") if x.type == "inline")
    assert [x.type for x in block.children] == ["text", "code_inline", "text"]
    content = block.children[1].content
    assert content == (shown(name) or " ") or (content.strip(" ") == "" == name.strip(" "))


def test_folders_are_named_by_their_last_part(tmp_path):
    for name in ("my model", "text.jsonl", "rows"):
        (tmp_path / name).mkdir()
    text = card(tmp_path / "my model", tmp_path / "text.jsonl", str(tmp_path / "rows"))
    assert str(tmp_path) not in text
    assert "base_model" not in text
    assert {"my model", "text.jsonl", "rows"} <= set(parts(text)[2])
