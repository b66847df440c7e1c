"""Long texts in pieces, however they come in, and groups of them."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from matt_fast.support.texts import Joined, bounded_pieces, groups, rejoin

LINES = st.text(st.sampled_from("ab\n "), max_size=60)


def cut(text: str, most: int) -> list[str]:
    """Behind the last line end that fits, else at the limit: written anew, on the whole text."""
    if len(text) <= most:
        return [text] if text else []
    end = max((i + 1 for i in range(most) if text[i] == "\n"), default=most)
    return [text[:end], *cut(text[end:], most)]


@given(LINES, st.integers(1, 9), st.integers(1, 7))
def test_where_blocks_end_does_not_matter(text, most, block):
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    assert list(rejoin(blocks, most)) == cut(text, most)


@given(st.lists(st.one_of(st.none(), LINES), max_size=5), st.integers(1, 9))
def test_documents_without_text_are_one_empty_piece(documents, most):
    expected = [cut(text, most) if text and text.strip() else [""] for text in documents]
    assert list(bounded_pieces(documents, most)) == list(chain(*expected))


@given(st.lists(st.text("ab", max_size=6), max_size=20), st.integers(1, 4))
def test_groups_are_no_larger_than_they_may_be(items, together):
    found = list(groups(items, together, most=7))
    assert list(chain(*found)) == items
    assert all(0 < len(group) <= together and sum(map(len, group)) <= 7 for group in found)


def test_joined_can_be_read_again():
    joined = Joined(["a"], ("b", "c"), ())
    assert list(joined) == list(joined) == ["a", "b", "c"]
