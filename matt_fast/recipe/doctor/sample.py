"""A part of the training text, under both tokenizers."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from matt_fast.data.chunks import make_chunks, sides_of
from matt_fast.data.compressed import compression_of
from matt_fast.data.documents import read_documents
from matt_fast.data.reading import find_files, format_of
from matt_fast.recipe.subject import Subject
from matt_fast.support.texts import groups

CHARACTERS, SECONDS = 1 << 19, 4.0  # read at most
TOGETHER = 64  # documents tokenised at a time


@dataclass(frozen=True)
class Segments:
    """What the sample's chunks are.

    Attributes:
        lengths: [chunks, 2], tokens under both tokenizers.
        sizes: [segments, 2], tokens of each segment.
        ids: new ids in them.
        skipped: what was left out, by reason.
    """

    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ids: NDArray[np.int64]
    skipped: Counter


@dataclass
class Sample:
    """The first documents, in the order that training would have them in; none where there is no text.

    Attributes:
        texts: of the documents.
        whole: whether these are all.
        share: of the files' bytes, about; None for a hub dataset, and of files that hold more text than bytes.
    """

    subject: Subject
    texts: list[str] = field(default_factory=list)
    whole: bool = False
    share: float | None = None

    @classmethod
    def read(cls, subject: Subject) -> "Sample":
        job, sample, characters, begin = subject.job, cls(subject), 0, time.monotonic()
        if job.data is None:
            return replace(sample, whole=True)
        documents = iter(read_documents(job.data, split=job.split, text_field=job.text_field, seed=job.seed))
        for text in documents:
            sample.texts.append(text)
            characters += len(text)
            if characters >= CHARACTERS or time.monotonic() - begin > SECONDS:
                break
        sample.whole = next(documents, None) is None
        files = find_files(job.data)
        if sample.whole:
            sample.share = 1.0
        elif files is not None and not any(compression_of(x) or format_of(x) == "parquet" for x in files):
            size = sum(file.stat().st_size for file in files)
            found = sum(len(text.encode()) for text in sample.texts)
            sample.share = min(0.999, found / max(1, size))
        return sample

    @property
    def name(self) -> str:
        """What was looked at."""
        if self.whole:
            return f"all {len(self.texts):,} documents"
        part = "" if self.share is None else f", about {self.share:.2g} of the bytes"
        return f"{len(self.texts):,} documents{part}"

    def batches(self, most: int) -> Iterator[list[str]]:
        """Its documents in groups, to so many characters."""
        total = 0
        for group in groups((text[:most] for text in self.texts if text and not text.isspace()), TOGETHER):
            yield group
            total += sum(map(len, group))
            if total >= most:
                return

    @cached_property
    def segments(self) -> Segments:
        sides = sides_of(self.subject.vocabulary, self.subject.job.max_length)
        lengths, sizes, ids, skipped = [], [], [], Counter()
        for chunk in make_chunks(self.texts, *sides, skipped):
            lengths.append(chunk.lengths)
            counts = [np.bincount(part[part >= 0]) for part in (chunk.teacher_segments, chunk.student_segments)]
            sizes.append(np.stack(counts, 1))
            ids.append(chunk.student_ids)
        empty = np.zeros((0, 2), np.int64)
        return Segments(
            np.array(lengths) if lengths else empty,
            np.concatenate(sizes) if sizes else empty,
            np.concatenate(ids) if ids else empty[:, 0],
            skipped,
        )


def sample_of(subject: Subject) -> Sample:
    """The subject's sample, read once."""
    return subject.once("sample", lambda: Sample.read(subject))
