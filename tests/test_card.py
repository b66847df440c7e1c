"""The model card: whatever a name holds, the card has the same metadata, headings and lines, and the name as a text."""

import inspect
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from matt_fast import HealingOptions, TrainingOptions, TransferResult, transfer
from matt_fast.cli import transfer as command
from matt_fast.evaluation import Evaluation
from matt_fast.initializers import InitReport
from matt_fast.recipe import licence_files
from matt_fast.recipe.base_card import Base, read_base
from matt_fast.recipe.card import code, model_card
from matt_fast.recipe.config import resolved_config
from matt_fast.recipe.licence_files import copy_licence
from matt_fast.recipe.result import Healing
from matt_fast.support.printable import printable
from matt_fast.training.state import Progress

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


def options(**given) -> dict:
    """What a run with these arguments writes down: the function's own defaults, and these."""
    usual = {name: x.default for name, x in inspect.signature(transfer).parameters.items()}
    training = TrainingOptions(**{name: given.pop(name) for name in ("steps", "attn_implementation") if name in given})
    return resolved_config(usual | {"training": training} | given)


def card(model="org/model", data="org/data", init="mean", attention="sdpa", base=None, **given) -> str:
    places = {"model": model, "tokenizer": "org/tokenizer", "data": data, "init": init, "output": "out"}
    base = Base(None if Path(model).exists() else str(model)) if base is None else base
    found = options(**places | given, attn_implementation=attention)
    return model_card(result(), found, base, pipeline_tag="text-generation")


def parts(text: str) -> tuple[dict, list[str], list[str]]:
    """Metadata, the kinds of Markdown's tokens, and the names in code spans."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(found[2])
    inline = [token for block in blocks for token in block.children or ()]
    kinds = [token.type for token in (*blocks, *inline)]
    return yaml.safe_load(found[1]), kinds, [token.content for token in inline if token.type == "code_inline"]


def shown(name: str) -> str:
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def fenced(text: str) -> str:
    (found,) = (x.content for x in MarkdownIt("gfm-like", {"linkify": False}).parse(text) if x.type == "fence")
    return found


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_cannot_break_out(name):
    metadata, kinds, names = parts(card())
    text = card(name, name, name, name, eval_data={name: name})
    found, its_kinds, its_names = parts(text)
    assert its_kinds == kinds
    assert found.keys() == metadata.keys() - {"datasets"} | ({"datasets"} if "datasets" in found else set())
    assert found["tags"] == metadata["tags"]
    assert found["base_model"].replace("\n", "\\n") == shown(name).replace("\\t", "\t")
    old = {"org/model", "org/data", "mean"}
    assert its_names == [shown(name) if x in old else x for x in names]
    words = shlex.split(fenced(text).replace("\\\n", ""))
    assert words[words.index("--model") + 1] == words[words.index("--attn-implementation") + 1] == shown(name)
    text.encode()


@given(st.text())
def test_any_name_is_one_code_span(name):
    (block,) = (x for x in MarkdownIt().parse(f"a {code(name)} b") if x.type == "inline")
    assert [x.type for x in block.children] == ["text", "code_inline", "text"]
    content = block.children[1].content
    assert content == (shown(name) or " ") or (content.strip(" ") == "" == name.strip(" "))


def test_counts_of_nothing_are_not_told(tmp_path):
    report = InitReport(5, 0, 0, 0)
    back = replace(result(), new=0, trainable=0, seen=0, progress=replace(result().progress, step=0), report=report)
    given = {"model": "org/model", "tokenizer": "org/tokenizer", "data": "org/data", "output": "out"}
    text = model_card(back, options(**given), Base())
    assert "tokens are new" not in text
    assert "trainable rows" not in text
    new = replace(result(), new=9, report=InitReport(5, 4, 3, 2))
    made = "- 9 tokens are new. `mean` made the first rows of 4; 3 were left to their sub-tokens; 2 to the mean of all"
    assert made in model_card(new, options(**given), Base())


def test_a_sentence_encoder_stays_one_for_the_hub(tmp_path):
    for said, library in (("sentence-transformers", "sentence-transformers"), ("mlx", "transformers")):
        (tmp_path / "README.md").write_text(f"---\nlibrary_name: {said}\n---\n")
        assert parts(card(base=read_base(tmp_path)))[0]["library_name"] == library


def test_folders_are_named_by_their_last_part(tmp_path):
    for name in ("my model", "text.jsonl", "rows"):
        (tmp_path / name).mkdir()
    text = card(tmp_path / "my model", tmp_path / "text.jsonl", str(tmp_path / "rows"), output=str(tmp_path / "out"))
    assert str(tmp_path) not in text
    assert "base_model" not in text
    assert "datasets" not in text
    assert {"my model", "text.jsonl", "rows"} <= set(parts(text)[2])


@pytest.mark.parametrize("several", [False, True])
def test_the_command_gives_the_same_arguments(monkeypatch, tmp_path, several):
    """The card's command goes through the command line, which is to call `transfer` as it was called."""
    given = {
        "model": "org/model", "tokenizer": "org/tokenizer", "data": "org/data", "output": str(tmp_path / "out"),
        "init": "omp", "donor": "org/donor", "init_head": "boundary", "map_tokens": ["<a>=b c", "<d>='e'"],
        "freeze_shared": False, "untie": True, "n_layers": 3, "max_length": 77, "batch_size": 5, "seed": 7,
        "per_token": 3, "eval_data": {"a b": "org/x", "c": "org/y"}, "eval_pieces": 9, "language": ["uk", "code"],
        "validate_every": 20, "patience": 2, "precision": "bf16", "split": "test", "text_field": "my text",
        "training": TrainingOptions("alm+ntp", steps=30, lr=1e-5, warmup_steps=3, alm_temperature=2.0, packing=True,
                                    max_grad_norm=None, decay_steps=4, moments="dense", accumulation=2),
        "healing": HealingOptions("lora", steps=12, lr=2e-4, rank=3, max_worse=0.5, keep_adapter=True),
    }  # fmt: skip
    if several:
        given |= {"epochs": 1.5, "healing": None, "n_layers": None, "eval_data": "org/x", "untie": False,
                  "training": TrainingOptions("aim", quantization="4bit", metric="cosine")}  # fmt: skip
    usual = {name: x.default for name, x in inspect.signature(transfer).parameters.items()}
    text = model_card(result(), resolved_config(usual | given), Base(), processes=1 + several)
    first, *words = shlex.split(fenced(text).replace("\\\n", ""))
    called = {}
    monkeypatch.setattr(command, "_transfer", lambda arguments, *more: called.update(arguments))
    start = ["matt-fast", "transfer"]
    if several:
        start = ["torchrun", "--nproc_per_node", "2", "-m", "matt_fast", "transfer"]
    assert [first, *words][: len(start)] == start
    ran = run("transfer", *[first, *words][len(start) :], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    expected = usual | given | {"output": Path("out"), "resume": False}
    wanted = {name: x for name, x in expected.items() if not name.startswith("on_")}
    wanted["map_tokens"], wanted["checkpoint_every"] = list(wanted["map_tokens"]), "auto"
    wanted["validate_every"] = str(wanted["validate_every"])
    assert {"n_layers": None} | called == wanted


def test_metadata_comes_from_the_original_and_from_what_was_measured(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: https://x.org\nlanguage: [en, de]\n"
        "pipeline_tag: text-generation\n---\n# It\n"
    )
    (tmp_path / "config.json").write_text('{"_name_or_path": "org/base"}')
    base = read_base(tmp_path)
    scores = {"trained": Evaluation(1.23456, 4.0, 100, 25, 2048, False)}
    measured = replace(result(), evaluations=scores, text="My text")
    given = options(model=tmp_path, tokenizer="t", data="org/data", output="out", eval_data={"My text": "org/held"})
    text = model_card(measured, given, base, pipeline_tag=base.pipeline_tag)
    found = parts(text)[0]
    assert {name: found[name] for name in ("license", "license_name", "license_link", "base_model", "datasets")} == {
        "license": "other", "license_name": "own", "license_link": "https://x.org", "base_model": "org/base",
        "datasets": ["org/data"],
    }  # fmt: skip
    assert (found["base_model_relation"], found["pipeline_tag"]) == ("finetune", "text-generation")
    assert "language" not in found
    assert "`en`, `de`" in text
    (scored,) = found["model-index"][0]["results"]
    assert [(x["type"], x["value"]) for x in scored["metrics"]] == [("bits_per_byte", 1.2346)]
    assert scored["dataset"] == {"name": "My text", "type": "my-text"}
    given = options(model=tmp_path, tokenizer="t", data="d", output="out", language=["uk"])
    assert parts(model_card(result(), given, base))[0]["language"] == ["uk"]


def test_what_is_not_known_of_the_original_is_left_out(tmp_path):
    assert read_base(tmp_path) == Base()
    for place in ("models--org--base/snapshots/0123", "plain"):
        (tmp_path / place).mkdir(parents=True)
    assert read_base(tmp_path / "models--org--base/snapshots/0123").name == "org/base"
    (tmp_path / "plain" / "config.json").write_text(f'{{"_name_or_path": "{tmp_path}"}}')
    (tmp_path / "plain" / "README.md").write_text("---\nlicense: [\n---\n")
    told = []
    assert read_base(tmp_path / "plain", told.append) == Base()
    assert told[0].startswith("README.md: no licence, as the card of ")


def test_the_card_tells_what_was_trained_and_nothing_else():
    """Rows and layers together from the start, as the recipe `quick` does; then both; then rows alone."""
    usual = {"model": "m", "tokenizer": "t", "data": "d", "init": "mean", "output": "out"}
    some = Progress(4, 0.5, [0.9, 0.5], tokens=300, seconds=2.0, epoch=1, skipped={"documents without text": 2})
    healed = Healing("lora", 10, some, [(2, 1.5), (4, 1.25)], 4)
    options_of_healing = {"healing": HealingOptions("lora", objective="ntp")}

    def told(found, **more):
        text = model_card(found, options(**usual | more), Base(None))
        return text.partition("## Training")[2].partition("## Make it again")[0]

    text = told(replace(result(), progress=Progress(loss=0.0), healing=healed), steps=0, **options_of_healing)
    assert "as they started.\n" not in text
    assert "target layer" not in text
    assert "- Rows and layers together (ntp): 2 steps, 300 tokens, 2 s, ended in pass 2 over the data;" in text
    assert "- 2 validations, the best at step 4 with 1.2500 bits per byte: its rows and layers are the result." in text
    assert "- Skipped: 2 documents without text." in text
    text = told(replace(result(), healing=replace(healed, best_step=0)), **options_of_healing)
    assert "The target layer was layer 2" in text
    assert (
        "- 2 validations, of none of which the weights were kept: the result is what this training began with." in text
    )
    assert "- none: rows are as they started." in told(replace(result(), progress=Progress(loss=0.0)), steps=0)
    for objective, layer, goal in (
        ("aim+ntp", True, "does what it did before (after Model-Aware Tokenizer Transfer, arXiv 2510.21954)."),
        ("segment-kl", False, "(segment-kl) so that the model with them does what it did before."),
        ("ntp", False, "were trained (ntp) on the text."),
    ):
        given = options(**usual) | {"objective": objective}
        text = model_card(result(), given, Base(None))
        assert ("target layer" in text) is layer
        assert goal in text


def test_the_texts_of_a_licence_go_with_the_model(tmp_path, monkeypatch):
    place, result = tmp_path / "model", tmp_path / "result"
    for folder in (place, result):
        folder.mkdir()
    theirs = ("LICENSE", "Licence.txt", "NOTICE.md", "COPYING", "USE_POLICY.md", "LICENSE-MODEL")
    for name in (*theirs, "README.md", "license_plates.json", "tokenizer.json"):
        (place / name).write_text(name)
    (place / "LICENSES").mkdir()
    (result / "NOTICE.md").write_text("its own")
    assert copy_licence(place, result) == []
    assert {path.name for path in result.iterdir()} == set(theirs)
    assert (result / "NOTICE.md").read_text() == "its own"
    assert (result / "LICENSE").read_text() == "LICENSE"
    asked = []
    monkeypatch.setattr(licence_files, "list_repo_files", lambda name, **more: asked.append((name, more)))
    monkeypatch.setattr(licence_files, "snapshot_download", lambda name, **more: asked.append((name, more)) or place)
    (result / "LICENSE").unlink()
    assert copy_licence("org/model", result, "0ab1") == []
    assert (result / "LICENSE").exists()
    known = {"revision": "0ab1"}
    online = {"allow_patterns": licence_files.PATTERNS, "local_files_only": False}
    assert asked == [("org/model", known), ("org/model", known | online)]
    monkeypatch.undo()
    # A cache that has the model and not its licence, and no hub to ask which texts there are.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--org--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "COPYING").write_text("cached")
    monkeypatch.setattr(
        licence_files, "snapshot_download", partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "cache")
    )
    (result / "COPYING").unlink()
    (line,) = copy_licence("org/model", result, "0" * 40)
    assert line.startswith("LICENSE: texts of the licence of 'org/model' may be missing, as they could not be read (")
    assert (result / "COPYING").read_text() == "cached"
    (line,) = copy_licence("org/other", result)
    assert "'org/other' may be missing" in line
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", path)))
    (result / "LICENSE").unlink()
    (line,) = copy_licence(place, result)
    assert "PermissionError" in line
