"""Every command and Python block of README and docs/ is run on tiny models, or taken up to its work, or says why not.

Commands of `matt-fast` are really run on the pages in RUN, and elsewhere parsed by the program and checked by it, up to
where it would load libraries and begin.
"""

import json
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import matt_fast
import matt_fast.cli.push
import matt_fast.cli.report
import matt_fast.model.tokenizer_files
import matt_fast.planning.plan
import matt_fast.recipe.push
from matt_fast.cli import app
from matt_fast.cli.progress import ProgressDisplay

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = {"docs/tutorial.md"}
BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n\s*)?^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
OUTPUT = {"", "json", "text", "yaml"}  # languages of blocks that are no commands
SHORTER = (  # what would take long
    (re.compile(r"HuggingFaceTB/SmolLM2-135M(?:-Instruct)?"), "MODEL"),
    (re.compile(r"\bsteps=\d+"), "steps=2"),
    (re.compile(r"--(heal-)?steps \d{2,}"), r"--\1steps 2"),
    (re.compile(r"--rehearse \d{2,}"), "--rehearse 2"),
    (re.compile(r"--add \d{2,}"), "--add 20"),
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    body: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    return [
        Block(name, text[: found.start(3)].count("\n"), found[2], dedent(found[3]), found[1])
        for found in BLOCK.finditer(text)
    ]


BLOCKS = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in PAGES}
ALL = [block for blocks in BLOCKS.values() for block in blocks if block.language not in OUTPUT]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with what pages name: in texts/ the files that the program wants to see, in all/ models too."""
    folder = tmp_path_factory.mktemp("world")
    ours = jsonl(TEXTS)
    others = "".join(json.dumps({"text": f"Other text, number {i}, to be held out."}) + "\n" for i in range(20))
    for name, content in {
        "corpus.jsonl": ours,
        "held-out.jsonl": others,
        "de-held-out.jsonl": others,
        "stdlib-held-out.jsonl": others,
        "files/german-train.jsonl": ours,
        "files/german-held-out.jsonl": others,
        "files/english-held-out.jsonl": others.replace("Other", "Some more"),
        "words.txt": "function",
        "table.tsv": "id\ttext\n1\tA text.\n",
        "chats.jsonl": json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n",
        "text.txt": TEXTS[0],
        "CODE.txt": TEXTS[0],
        "ENGLISH.txt": TEXTS[1],
        "rows.safetensors": "",
        "PREPARED/manifest.json": "{}",
        "tests/tasks/everyday.yaml": "",
    }.items():
        (folder / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "texts" / name).write_text(content, encoding="utf-8")
    shutil.copytree(folder / "texts", folder / "all")
    for name in ("MODEL", "CHAT_MODEL", "files/smollm2-135m-instruct"):
        save_tiny_model(folder / "all" / name)
    for name in ("NEW", "path/to/new-tokenizer", "start"):
        new_tokenizer().save_pretrained(folder / "all" / name)
    student = AutoModelForCausalLM.from_pretrained(folder / "all" / "MODEL")
    student.resize_token_embeddings(len(new_tokenizer()), mean_resizing=False)
    student.save_pretrained(folder / "all" / "start")
    shutil.copytree(folder / "all" / "start", folder / "all" / "FOLDER")
    (folder / "all" / "FOLDER" / "token_provenance.jsonl").write_text('{"id": 329, "start": "mean"}\n')
    (folder / "all" / "TEXT").mkdir()
    (folder / "all" / "TEXT" / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def names(world):
    """What snippets take as given."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(world / "all" / "MODEL")
    ids = torch.randint(5, 200, (1, 12))
    segments = torch.arange(12)[None] // 2
    states = matt_fast.capture_attention(model, 1, input_ids=ids).states
    offsets = [(i, i + 1) for i in range(12)]
    return {"torch": torch, "layer": 1} | {
        f"{side}_{name}": value
        for side in ("teacher", "student")
        for name, value in {
            "model": model,
            "ids": ids,
            "offsets": offsets,
            "segments": segments,
            "states": states,
        }.items()
    }


def shortened(text: str) -> str:
    for pattern, replacement in SHORTER:
        text = pattern.sub(replacement, text)
    return text


class Reached(BaseException):
    """All that is checked before the work was right."""


def reach(*arguments, **options):
    raise Reached


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(x in ALL for x in blocks)])
def test_blocks_of(page, world, names, tmp_path, monkeypatch):
    """A page's blocks, from its top to its end, in one folder and with one set of Python names."""
    for name in ("all", "texts"):
        shutil.copytree(world / name, tmp_path / name)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    namespace = dict(names)
    for block in BLOCKS[page]:
        if block.reason is not None or block.language in OUTPUT:
            continue
        assert block.language in ("python", "sh"), f"{block.place}: a language that no test runs"
        if block.language == "python":
            monkeypatch.chdir(tmp_path / "all")
            exec(compile("\n" * block.line + shortened(block.body), block.place, "exec"), namespace)
            continue
        monkeypatch.chdir(tmp_path / ("all" if page in RUN else "texts"))
        for line in shortened(block.body).replace("\\\n", " ").splitlines():
            check_command(shlex.split(line, comments=True), block, monkeypatch)


def check_command(words: list[str], block: Block, monkeypatch) -> None:
    """Run a command, or find out that it could be run."""
    match words:
        case []:
            pass
        case ["matt-fast", *arguments]:
            run_command(arguments, block, monkeypatch)
        case ["accelerate" | "torchrun", *arguments]:
            run_command(arguments[arguments.index("-m") + 2 :], block, monkeypatch)
        case ["pip", "install", what]:
            assert set(re.findall(r"[\w-]+", what.partition("[")[2])) <= EXTRAS.keys(), block.place
        case ["make", target, *_]:
            assert target in TARGETS, f"{block.place}: no such target"
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), f"{block.place}: no such file"
        case _:
            pytest.fail(f"{block.place}: nothing here knows how to check {shlex.join(words)!r}")


def make_results(arguments: list[str]) -> None:
    """The folders of transfers that a command wants to see, as far as it looks before its work; anew for each."""
    folders: tuple[str, ...] = ()
    if "--resume" in arguments:
        folders = (arguments[arguments.index("--resume") + 1],)
    elif arguments[0] in ("show", "report", "push") or "--card" in arguments:
        folders = ("FOLDER", "adapted", "A", "B", "C")
    for folder in ("FOLDER", "adapted", "A", "B", "C"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in folders:
        Path(folder, "run").mkdir(parents=True, exist_ok=True)
        Path(folder, "run", "run.yaml").write_text("model: MODEL\ntokenizer: NEW\ndata: TEXT\n")
        for name in (
            "config.json",
            "README.md",
            "run/run.json",
            "run/result.json",
            "run/state.json",
        ):
            Path(folder, name).write_text("{}")
        Path(folder, "token_provenance.jsonl").touch()


def run_command(arguments: list[str], block: Block, monkeypatch) -> None:
    if "…" in arguments[:2]:  # what another command on the page has
        at = arguments.index("…")
        arguments[at : at + 1] = ["--model=MODEL", "--tokenizer=NEW", "--data=TEXT", "--output=FOLDER"]
    if block.page not in RUN:
        make_results(arguments)
    with monkeypatch.context() as patched:
        if block.page not in RUN:
            patched.setattr(ProgressDisplay, "on_stage", reach)
            patched.setattr(matt_fast.model.tokenizer_files, "load_tokenizer", reach)
            patched.setattr(matt_fast.planning.plan, "plan", reach)
            patched.setattr(matt_fast.cli.report, "read_record", reach)
            patched.setattr(matt_fast.show.choices, "read_record", reach)
            patched.setattr(matt_fast.cli.push, "has_terminal", lambda: True)
            patched.setattr(matt_fast.recipe.push, "find_target", reach)
        try:
            result = CliRunner().invoke(app, arguments)
        except Reached:
            return
    said = f"{block.place}: {shlex.join(arguments)}\n{result.output}"
    worse = "The result is worse than its start" in result.output  # random weights and two steps: written, and said
    assert result.exit_code == int(worse), said
    assert block.page in RUN or "--help" in arguments, f"was really run: {said}"


def test_blocks_that_are_not_run_say_why(capsys):
    reasons = [f"{block.place}: {block.reason}" for block in ALL if block.reason is not None]
    assert len(reasons) <= len(ALL) / 4
    with capsys.disabled():
        print("\nnot run:", *reasons, sep="\n  ")


def test_links_outside_the_site_lead_somewhere():
    """Those in docs/ are looked at by `make docs`."""
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("benchmarks/*.md")):
        for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = {name: module for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", page, re.MULTILINE)}
    assert not set(matt_fast.__all__) - listed.keys()


def test_the_notebook_runs_from_top_to_bottom(world, tmp_path):
    """On a tiny model: its parameters are replaced, and every figure is drawn."""
    notebook = nbformat.read(ROOT / "examples" / "matt_fast.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored with outputs"
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    texts = [str(world / "texts" / name) for name in ("corpus.jsonl", "held-out.jsonl", "files/english-held-out.jsonl")]
    parameters.source += f"\nMODEL, TEXTS = {str(world / 'all' / 'MODEL')!r}, {texts!r}"
    parameters.source += "\nNEW_TOKENS, STEPS, REHEARSED, PIECES, WRITTEN = 20, 2, 2, 2, 3"
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=600).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    assert "adapted: " in "".join(output.get("text", "") for output in outputs)
    assert (tmp_path / "german-model" / "model.safetensors").exists()
