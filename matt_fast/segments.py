"""The public names of `matt_fast.alignment.segments` under their short path."""

from matt_fast.alignment.segments import SPECIAL, align_segments, align_segments_batch

__all__ = [
    "SPECIAL",
    "align_segments",
    "align_segments_batch",
]
