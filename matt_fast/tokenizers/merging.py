"""How the merges of a BPE model put an entry together, and which more would make it one token."""

from collections.abc import Collection, Sequence
from itertools import pairwise

from matt_fast.tokenizers.source import Source
from matt_fast.tokenizers.spelling import splits_character

MOST_PIECES = 64  # of an entry that is to become one token
SPLIT = 1 / 1024  # of an entry: what a whole character with a part of another costs more
UNREACHABLE = "needs a merge to a token that the base makes otherwise"


class Merging:
    """A BPE model's vocabulary and ranked merges, to which more can be appended.

    Attributes:
        known: how the vocabulary writes its tokens, those appended too.
        added: entries that were appended, in order; and `merges`, those that make them.
    """

    def __init__(self, base: Source):
        model = base.backend["model"]
        self.old = frozenset(base.entries)
        self.known = set(self.old)
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.sentencepiece = base.sentencepiece
        self.byte_fallback = bool(model.get("byte_fallback"))
        self.added: list[str] = []
        self.merges: list[tuple[str, str]] = []

    def pieces(self, entry: str) -> list[str]:
        """The tokens that merges make of an entry alone, as the model does it: the lowest rank first."""
        return self._merge(entry)[0]

    def parts(self, entry: str) -> list[str]:
        """What an entry's token is made of: two tokens by the last merge, or pieces where no merges lead to it."""
        pieces, before = self._merge(entry)
        return before if pieces == [entry] else pieces

    def _merge(self, entry: str) -> tuple[list[str], list[str]]:
        """The pieces, and those before the last merge."""
        pieces: list[str] = []
        for character in entry:
            spelled = [f"<0x{byte:02X}>" for byte in character.encode()]
            fall_back = character not in self.known and self.byte_fallback and self.known.issuperset(spelled)
            pieces += spelled if fall_back else [character]
        before = pieces
        while len(pieces) > 1:
            rank, pair = min((self.ranks.get(pair, len(self.ranks)), pair) for pair in pairwise(pieces))
            if rank == len(self.ranks):
                break
            merged, at = [], 0
            while at < len(pieces):
                both = tuple(pieces[at : at + 2]) == pair
                merged.append(pieces[at] + pieces[at + 1] if both else pieces[at])
                at += 1 + both
            before, pieces = pieces, merged
        return pieces, before

    def add(self, entry: str, wanted: Collection[str] = ()) -> bool:
        """Append an entry, with merges that make it one token, and the parts that these need.

        No merge makes a token of the base, so that none takes the place of the base's own way to it.

        Args:
            entry: that is not known.
            wanted: entries that will be appended too, and cost nothing as parts.

        Returns:
            False if it cannot be reached so; nothing is appended then.
        """
        before = len(self.added), len(self.merges)
        missing = [x for x in dict.fromkeys(entry) if x not in self.known]
        for character in missing:
            self._append(character)
        while len(pieces := self.pieces(entry)) > 1:
            pair = self._first_merge(pieces, wanted) if len(pieces) <= MOST_PIECES else None
            if pair is None or pair in self.ranks:
                self._forget(*before)
                return False
            self.ranks[pair] = len(self.ranks)
            self.merges.append(pair)
            self._append("".join(pair))
        return True

    def _append(self, entry: str) -> None:
        if entry not in self.known:
            self.known.add(entry)
            self.added.append(entry)

    def _forget(self, entries: int, merges: int) -> None:
        for entry in self.added[entries:]:
            self.known.remove(entry)
        for pair in self.merges[merges:]:
            del self.ranks[pair]
        del self.added[entries:], self.merges[merges:]

    def _first_merge(self, pieces: Sequence[str], wanted: Collection[str]) -> tuple[str, str] | None:
        """The merge to begin with of those that make one token of the pieces with the fewest entries more.

        Of as many entries those that are whole characters, or a part of one, are taken.
        """
        best: dict[tuple[int, int], tuple[float, int]] = {(i, i + 1): (0, i) for i in range(len(pieces))}
        for size in range(2, len(pieces) + 1):
            for start in range(len(pieces) - size + 1):
                end, part = start + size, "".join(pieces[start : start + size])
                costs = ((best[start, cut][0] + best[cut, end][0], cut) for cut in range(start + 1, end))
                cost, cut = min(costs)
                own: float = 0 if part in self.known or part in wanted else 1
                if part in self.old:
                    own = float("inf")
                elif own and not self.sentencepiece and splits_character(part):
                    own += SPLIT
                best[start, end] = cost + own, cut
        if best[0, len(pieces)][0] == float("inf"):
            return None
        start, end = 0, len(pieces)
        while end - start > 2:
            cut = best[start, end][1]
            start, end = (start, cut) if cut - start > 1 else (cut, end)
        return pieces[start], pieces[start + 1]
