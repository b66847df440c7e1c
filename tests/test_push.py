"""The hub: what goes up, who is asked, what is refused before any work, and what a failed push says."""

from types import SimpleNamespace

import commands
import huggingface_hub
import pytest
from huggingface_hub import errors

from matt_fast.cli import push as command
from matt_fast.cli import transfer as transferring
from matt_fast.recipe.push import LEFT_OUT, files_to_push

WHOLE = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "README.md": "card",
    "report.html": "page",
    "extra/code.py": "x = 1",
    "run/run.yaml": "model: /home/me/model",
    "run/lock": "process 1",
    "adapter/adapter_config.json": "{}",
    "checkpoint-20/model.safetensors": "weights",
    ".cache/x": "x",
    ".part-model.safetensors": "half",
}
MODEL = ["README.md", "config.json", "extra/code.py", "model.safetensors", "tokenizer.json"]


class Hub:
    """In place of HfApi: who is logged in, what is there, and what is done."""

    def __init__(self, role="write", orgs=(), there=None, private=True, fails=False, scoped=()):
        rights = {"role": role, "displayName": "mine", "fineGrained": {"scoped": list(scoped)}}
        self.about = {"name": "me", "orgs": list(orgs), "auth": {"accessToken": rights}}
        self.there, self.private, self.fails = there, private, fails
        self.made, self.done = [], []

    def whoami(self):
        return self.about

    def repo_info(self, name, files_metadata):
        if self.there is None:
            response = SimpleNamespace(headers={}, status_code=404, request=None)
            raise errors.RepositoryNotFoundError("no such repository", response=response)
        return SimpleNamespace(private=self.private, siblings=[SimpleNamespace(rfilename=x) for x in self.there])

    def create_repo(self, name, private, exist_ok):
        if self.fails:
            raise ConnectionError("the line is down")
        self.made.append((name, private))
        return f"https://hub/{name}"

    def create_commit(self, name, operations, commit_message):
        self.done += [(type(x).__name__.removeprefix("CommitOperation"), x.path_in_repo) for x in operations]


@pytest.fixture
def folder(tmp_path):
    for name, text in WHOLE.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "out"


def run(monkeypatch, hub, *words, token="hf_x", terminal=False, answer=""):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(command, "has_terminal", lambda: terminal)
    return commands.run(*words, input=answer)


def test_the_model_goes_up_and_nothing_else(monkeypatch, folder):
    hub = Hub()
    done = run(monkeypatch, hub, "push", folder, "--to", "me/new", "--yes")
    assert done.exit_code == 0, done.output
    assert hub.made == [("me/new", True)]
    assert hub.done == [("Add", name) for name in MODEL]
    for name in MODEL:
        assert name in done.stdout
    assert done.stdout.index("model.safetensors") < done.stdout.index("Pushed: https://hub/me/new")
    assert "private, new" in done.stdout
    asked = Hub(there=["model-00001-of-00002.safetensors", "notes.md", "config.json"])
    done = run(monkeypatch, asked, "push", folder, "--to", "new", "--also", "adapter", terminal=True, answer="y\n")
    assert done.exit_code == 0, done.output
    added = [name for kind, name in asked.done if kind == "Add"]
    assert sorted(added) == sorted([*MODEL, "adapter/adapter_config.json"])
    assert [name for kind, name in asked.done if kind == "Delete"] == ["model-00001-of-00002.safetensors"]
    assert "Goes away there, as no part of this model: model-00001-of-00002.safetensors" in done.stdout
    assert {name for name, _ in files_to_push(folder, LEFT_OUT)} == {
        *MODEL, "report.html", "adapter/adapter_config.json", "run/run.yaml"
    }  # fmt: skip


def test_who_says_no_is_told_how_to_do_it_later(monkeypatch, folder):
    hub = Hub()
    no = run(monkeypatch, hub, "push", folder, "--to", "me/new", "--public", terminal=True, answer="n\n")
    assert no.exit_code == 1
    assert f"matt-fast push {folder} --to me/new --public" in no.stdout.replace("\n", "")
    assert hub.made == []
    broken = run(monkeypatch, Hub(fails=True), "push", folder, "--to", "me/new", "--yes")
    assert broken.exit_code == 1
    assert "push: 'me/new' did not take it: the line is down" in broken.stderr
    assert f"To push it again: matt-fast push {folder} --to me/new" in broken.stderr
    more = "--also", "run", "--public", "--yes"
    broken = run(monkeypatch, Hub(fails=True), "push", folder, "--to", "me/new", *more)
    assert f"To push it again: matt-fast push {folder} --to me/new --public --also run\n" in broken.stderr


def test_a_hub_that_does_not_say_what_is_there_is_told_as_such(monkeypatch, folder):
    hub = Hub()
    hub.repo_info = raising(ConnectionError("503 Service Unavailable"))
    found = run(monkeypatch, hub, "push", folder, "--to", "me/new", "--yes")
    assert found.exit_code == 1
    assert "to: the hub did not say whether 'me/new' is there: 503 Service Unavailable" in found.stderr
    assert not hub.made


def raising(error):
    def fail(*given, **named):
        raise error

    return fail


TEAM = {"name": "team", "roleInOrg": "read"}
SCOPE = {"entity": {"name": "me/old"}, "permissions": ["repo.write"]}


@pytest.mark.parametrize(
    ("hub", "name", "more", "words"),
    [
        (Hub(), "a/b/c", {}, "push_to_hub: wanted a name like OWNER/NAME, got 'a/b/c'"),
        (Hub(), "me/new", {"token": None}, "push_to_hub: wanted a token that may write to 'me/new', got none: log in"),
        (Hub("read"), "me/new", {}, "push_to_hub: the token 'mine' may not write to 'me/new'"),
        (Hub("fineGrained", scoped=[SCOPE]), "me/new", {}, "push_to_hub: the token 'mine' may not write to 'me/new'"),
        (Hub(), "you/new", {}, "push_to_hub: 'me' is logged in, who is no member of 'you'"),
        (Hub(orgs=[TEAM]), "team/new", {}, "push_to_hub: 'me' may only read in 'team'"),
        (Hub(there=[], private=False), "me/new", {}, "push_to_hub: 'me/new' is there already, and everyone sees it"),
    ],
    ids=range(7),
)
def test_what_is_refused_before_a_transfer_begins(monkeypatch, tmp_path, hub, name, more, words):
    """Nothing of the transfer is looked at: its model is not there."""
    started = []
    monkeypatch.setattr(transferring, "_transfer", lambda *given: started.append(given))
    places = ("transfer", "--model", "a/b", "--tokenizer", "a/c", "--data", "a/d", "--output", tmp_path / "new")
    refused = run(monkeypatch, hub, *places, "--push-to-hub", name, "--yes", **more)
    assert refused.exit_code == 1
    assert words in refused.stderr.replace("\n", " ")
    assert started == []


def test_a_transfer_asks_at_its_end_or_not_at_all(monkeypatch, folder, tmp_path):
    places = ("transfer", "--model", "a/b", "--tokenizer", "a/c", "--data", "a/d", "--output", tmp_path / "new")
    refused = run(monkeypatch, Hub(), *places, "--push-to-hub", "me/new")
    assert refused.exit_code == 1
    assert "yes: wanted --yes, as there is no terminal to ask on" in refused.stderr.replace("\n", " ")
    refused = run(monkeypatch, Hub(), *places, "--public")
    assert "public: wanted push_to_hub with it, got none" in refused.stderr
    refused = run(monkeypatch, Hub(), *places, "--push-to-hub", "me/new", "--yes", "--layer", "sweep")
    assert "push_to_hub: wanted a transfer at one layer, got a sweep" in refused.stderr
    nothing = run(monkeypatch, Hub(), "push", tmp_path, "--to", "me/new", "--yes")
    assert "folder: wanted the output of a transfer with config.json" in nothing.stderr
    nothing = run(monkeypatch, Hub(), "push", folder, "--to", "me/new", "--yes", "--also", "weights")
    assert "also: wanted run, adapter, report.html, got 'weights'" in nothing.stderr
    nothing = run(monkeypatch, Hub(), "push", folder, "--to", "a/b/c", "--yes")
    assert "Error: to: wanted a name like OWNER/NAME, got 'a/b/c'" in nothing.stderr
    scoped = Hub("fineGrained", scoped=[SCOPE], there=[])
    assert run(monkeypatch, scoped, "push", folder, "--to", "me/old", "--yes").exit_code == 0
