"""A tokenizer as its tokenizer.json, to be changed, and the folder that the changed one is written to."""

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import check_constant, check_distinct_ids, check_fast
from matt_fast.model.tokenizer_files import FILE, first_difference, load_tokenizer
from matt_fast.support.files import whole_folder

SETTINGS = "tokenizer_config.json"
SAMPLE = 1 << 18  # characters
PLAIN = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it is


@dataclass(frozen=True)
class Source:
    """A fast tokenizer and what its tokenizer.json says.

    Attributes:
        tokenizer: as transformers loads it, with its special tokens and chat template.
        backend: the content of its tokenizer.json; merges are pairs. Not to be changed in place.
        argument: what errors call it.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: dict
    argument: str

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel."""
        return self.backend["model"]["type"]

    @cached_property
    def plain(self) -> Tokenizer:
        """The tokenizer that `backend` describes, without truncation and padding."""
        return Tokenizer.from_str(json.dumps(self.backend | {"truncation": None, "padding": None}))

    @cached_property
    def by_merges(self) -> models.BPE:
        """The BPE model, which puts tokens together by merges alone: none is looked up whole."""
        model = self.backend["model"] | {"ignore_merges": False}
        return Tokenizer.from_str(json.dumps(self.backend | {"model": model})).model

    @cached_property
    def entries(self) -> dict[str, int]:
        """How its file writes each token -> id: the model's vocabulary and the added tokens."""
        vocab = self.backend["model"]["vocab"]
        found = dict(vocab) if isinstance(vocab, dict) else {entry: i for i, (entry, _) in enumerate(vocab)}
        return found | {token["content"]: token["id"] for token in self.backend["added_tokens"]}

    @property
    def sentencepiece(self) -> bool:
        """Whether its vocabulary writes "▁" for a space; a byte-level one writes bytes in an alphabet of its own."""
        return '"ByteLevel"' not in json.dumps(self.backend["decoder"])


def read_source(model: str | Path | PreTrainedTokenizerBase, argument: str = "model", **options) -> Source:
    """Load a tokenizer to be changed.

    Args:
        model: folder or hub name of a model or tokenizer, a tokenizer.json, or a fast tokenizer.
        argument: what errors call it.
        **options: for loading it.

    Raises:
        TypeError: it is not a fast tokenizer.
        ValueError: it cannot be loaded, draws its tokens at random, or has two tokens with one id.
    """
    loaded = isinstance(model, PreTrainedTokenizerBase)
    tokenizer = copy.deepcopy(model) if loaded else load_tokenizer(model, argument, **options)
    check_fast(tokenizer, argument)
    check_constant(tokenizer, argument)
    check_distinct_ids(tokenizer, argument)
    return Source(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()), argument)


def append_tokens(source: Source, entries: Iterable[str], merges: Iterable[tuple[str, str]]) -> Source:
    """The tokenizer with more tokens in its BPE vocabulary, whose ids follow the largest one, and more merges.

    Added tokens enter the vocabulary under the ids that they have: `tokenizers` would count them anew behind a
    vocabulary that has grown.
    """
    backend = copy.deepcopy(source.backend)
    vocab = backend["model"]["vocab"] = dict(source.entries)
    first = max(vocab.values()) + 1
    vocab.update({entry: first + i for i, entry in enumerate(entries)})
    backend["model"]["merges"] += [list(pair) for pair in merges]
    return Source(source.tokenizer, backend, source.argument)


def keep_tokens(source: Source, kept: Collection[str]) -> Source:
    """The tokenizer with some of its tokens only, and the merges between them. Ids close up, in their order."""
    backend = copy.deepcopy(source.backend)
    old = sorted((i, entry) for entry, i in source.entries.items() if entry in kept)
    ids = {entry: new for new, (_, entry) in enumerate(old)}
    backend["model"]["vocab"] = ids
    backend["model"]["merges"] = [pair for pair in backend["model"]["merges"] if {*pair, "".join(pair)} <= ids.keys()]
    for token in backend["added_tokens"]:
        token["id"] = ids[token["content"]]
    backend["post_processor"] = _renumbered(backend["post_processor"], ids)
    return Source(source.tokenizer, backend, source.argument)


def _renumbered(part: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor with other ids for its special tokens."""
    if isinstance(part, dict) and {"ids", "tokens"} <= part.keys():
        return part | {"ids": [ids[token] for token in part["tokens"]]}
    if isinstance(part, dict):
        return {
            key: [value[0], ids[value[0]]] if key in ("cls", "sep") else _renumbered(value, ids)
            for key, value in part.items()
        }
    return [_renumbered(x, ids) for x in part] if isinstance(part, list) else part


def write_tokenizer(
    source: Source, output: str | Path, look: Callable[[PreTrainedTokenizerBase], None] = lambda made: None
) -> None:
    """Write a tokenizer's folder, whole or not at all.

    Where transformers would build another tokenizer by the class that the settings name, they get the plain class.

    Args:
        source: the tokenizer.
        output: folder to write.
        look: called with what is loaded from the folder before it takes its name; raises if it is not as it should be.
    """
    with whole_folder(output) as part:
        source.tokenizer.save_pretrained(part)
        Tokenizer.from_str(json.dumps(source.backend)).save(str(part / FILE), pretty=False)
        if first_difference(AutoTokenizer.from_pretrained(part), source.plain) is not None:
            settings = json.loads((part / SETTINGS).read_text(encoding="utf-8"))
            settings["tokenizer_class"] = PLAIN
            (part / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        look(load_tokenizer(part, "output"))


class Sample:
    """Texts that pass by, the first of which are kept.

    Attributes:
        texts: the first ones, SAMPLE characters of them at most.
    """

    def __init__(self, texts: Iterable[str]):
        self._texts, self._room = texts, SAMPLE
        self.texts: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self._room > 0:
                self.texts.append(text[: self._room])
                self._room -= len(text)
            yield text
