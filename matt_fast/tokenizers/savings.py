"""What each added token of a BPE tokenizer saves on a text, told by one pass over it.

BPE applies merges by rank, so a tokenizer with fewer of the added merges stops earlier on the same way: the tokens that
it gives are those from which the later merges would go on. How a token was put together depends on its own characters
alone, since nothing was ever merged across its ends. So counts of the tokens in a text tell the counts under every
smaller vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

SHARES = (0.5, 0.9, 0.95)  # of what all added tokens save


@dataclass(frozen=True)
class Savings:
    """Tokens of a text under a tokenizer with its first 0, 1, 2, … added tokens.

    Attributes:
        tokens: [added + 1] int64.
        bytes: of the text.
    """

    tokens: NDArray[np.int64]
    bytes: int

    @property
    def bytes_per_token(self) -> NDArray[np.float64]:
        return self.bytes / self.tokens

    def added_for(self, share: float) -> int:
        """The smallest number of added tokens that saves this share of what all of them save."""
        saved = self.tokens[0] - self.tokens
        return int(np.argmax(saved >= share * saved[-1]))

    def saved_by_last(self, count: int) -> float:
        """By how much of the tokens the last so many added ones shorten the text."""
        before = self.tokens[max(0, len(self.tokens) - 1 - count)]
        return 1 - float(self.tokens[-1] / before)


class Merges:
    """How the added tokens of a tokenizer are put together.

    Args:
        base, tokenizer: fast tokenizers; the second has the merges of the first, then more.

    Attributes:
        added: the entries of added tokens, in the order in which they come: characters, then by merge.

    Raises:
        ValueError: they are no BPE, or the second does not go on with the merges of the first.
    """

    def __init__(self, base: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase):
        old, new = (json.loads(x.backend_tokenizer.to_str())["model"] for x in (base, tokenizer))
        for model in (old, new):
            if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
                raise ValueError("tokenizer: wanted BPE with merges in order, for a curve over added tokens")
        first, merges = ([tuple(x) for x in model["merges"]] for model in (old, new))
        if merges[: len(first)] != first:
            raise ValueError("tokenizer: wanted the first tokenizer's merges, then more, for a curve over added tokens")
        known = old["vocab"].keys()
        self._ids, self._old, self._merges = new["vocab"], known, len(first)
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        characters = [x for x in new["vocab"] if len(x) == 1 and x not in known]
        self._spelled = bool(new.get("byte_fallback"))  # by bytes, where a character is missing
        by_merge = (left + right for left, right in merges[len(first) :])
        self.added = list(dict.fromkeys([*characters, *(x for x in by_merge if x not in known)]))
        self._characters, self._position = set(characters), {x: n for n, x in enumerate(characters, 1)}
        # How many added tokens there are when a merge of the added ones is: [added merges].
        seen, self._place = set(characters), []
        for left, right in merges[len(first) :]:
            if left + right not in known:
                seen.add(left + right)
            self._place.append(len(seen))
        self._ways: dict[str, list[int]] = {}

    def savings(self, counts: Mapping[int, int], size: int) -> Savings:
        """What the first so many added tokens save.

        Args:
            counts: id -> how often it occurs in the text under the whole tokenizer.
            size: bytes of the text.

        Raises:
            ValueError: an added token occurs that no merge gives.
        """
        later = np.zeros(len(self.added) + 1, np.int64)  # tokens more where the n-th added one is missing
        for entry, i in self._ids.items():
            if count := counts.get(i, 0):
                if entry not in self._ways:
                    self._ways[entry] = self._way(entry)
                np.add.at(later, np.array(self._ways[entry], np.int64), count)
        whole = sum(counts.values())
        behind = np.cumsum(later[::-1])[::-1]
        return Savings(whole + np.append(behind[1:], 0), size)

    def _way(self, entry: str) -> list[int]:
        """Which added tokens had to be there for an entry to become one token, each for one token less."""
        way = []
        if self._spelled:
            for character in self._characters & set(entry):
                way += [self._position[character]] * (len(character.encode()) - 1) * entry.count(character)
        parts, highest, never = list(entry), 0, self._merges + len(self._place)
        while len(parts) > 1:
            rank, at = min((self._rank.get(pair, never), at) for at, pair in enumerate(pairwise(parts)))
            if rank == never and entry in self._old:  # not by merges, under either tokenizer
                return []
            if rank == never:
                raise ValueError(
                    f"tokenizer: wanted merges that make its token {entry!r}, for a curve over added tokens"
                )
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            highest = max(highest, rank)  # without that merge those behind it would not have come
            if highest >= self._merges:
                way.append(self._place[highest - self._merges])
        return way
