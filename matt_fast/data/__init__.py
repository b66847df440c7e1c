"""Texts for training: read, cut into aligned chunks, made into batches.

In that order: documents.py, chunks.py, packing.py, batches.py, and stream.py, the endless stream that training takes;
positions.py says where it stands, for any number of processes. prepared.py keeps chunks on disk, shards.py those that
`matt-fast prepare` made; parallel.py reads texts and their translations, for initialisers; snippets.py lets a
model write texts.
"""

from typing import TYPE_CHECKING

from matt_fast.support.lazy import lazy_names

if TYPE_CHECKING:
    from matt_fast.data.chunks import Side as Side
    from matt_fast.data.chunks import make_chunks as make_chunks
    from matt_fast.data.documents import read_documents as read_documents
    from matt_fast.data.parallel import read_pairs as read_pairs
    from matt_fast.data.snippets import make_snippets as make_snippets
    from matt_fast.data.stream import AlignedBatches as AlignedBatches

_WHERE = {
    "AlignedBatches": "matt_fast.data.stream",
    "Side": "matt_fast.data.chunks",
    "make_chunks": "matt_fast.data.chunks",
    "make_snippets": "matt_fast.data.snippets",
    "read_documents": "matt_fast.data.documents",
    "read_pairs": "matt_fast.data.parallel",
}

__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
