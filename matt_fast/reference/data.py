"""The batches of `MATT`, from data that was prepared on disk, pass after pass."""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from matt_fast.data.batches import Batch, collate
from matt_fast.data.packing import Chunk
from matt_fast.data.prepared import COLUMNS
from matt_fast.reference.config import MATTConfig


def batches(data: Dataset, config: MATTConfig, accelerator: Accelerator) -> Iterator[Batch]:
    """Batches of this process, without end; each pass over the data has an order of its own."""

    def make(rows: list[dict]) -> Batch:
        chunks = [[Chunk(*(row[name].astype(np.int64) for name in COLUMNS))] for row in rows]
        return collate(chunks, Counter(), config.pad_to_multiple_of)

    processes = accelerator.num_processes
    for epoch in itertools.count():
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data))
        order = np.resize(order, math.ceil(len(order) / processes) * processes)  # as many for each process
        mine = order[accelerator.process_index :: processes].tolist()
        with warnings.catch_warnings():  # the default num_workers is the reference library's, more than some have cores
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(data, config.batch_size, sampler=mine, collate_fn=make, num_workers=config.num_workers)
            passing = iter(loader)
        yield from passing
