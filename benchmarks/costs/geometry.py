"""The loops over a plan, counted: which turns the kernels make, and which pairs of rows and tokens are in them."""

import numpy as np
from matt_kernels import AimPlan


class Geometry:
    """Loops over a plan, counted: turns are of one head (rows) or one head of a key head (columns)."""

    def __init__(self, plan: AimPlan):
        self.rows, self.tiles = plan.rows.numpy().astype(np.int64), plan.tiles.numpy().astype(np.int64)
        self.long, self.counts = plan.long.numpy(), plan.counts.numpy().astype(np.int64)
        self.ids = plan.teacher_segments.numpy(), plan.student_segments.numpy()
        self.batch, _, self.row_limit = self.rows.shape
        self.lengths = tuple(x.shape[1] for x in self.ids)

    def row_blocks(self, block_m: int) -> int:
        return -(-self.row_limit // block_m)

    def token_turns(self, side: int, block_m: int, block_n: int) -> tuple[int, int]:
        """(turns, tokens passed) of loops over the tokens that some row of a block sees: softmax, attend."""
        lows, highs = self._by_block(2 + 2 * side, 3 + 2 * side, block_m)
        spans = (highs - lows).clip(min=0)
        return int((-(-spans // block_n)).sum()), int(spans.sum())

    def tile_turns(self, block_m: int) -> tuple[int, int, int]:
        """(turns, teacher tokens passed, student tokens passed) of aim_rows."""
        lows, highs = self._by_block(6, 7, block_m)
        turns, passed = 0, np.zeros(2, np.int64)
        for batch, (low, high) in enumerate(zip(lows, highs, strict=True)):
            tokens = np.stack(
                [self.tiles[batch, 1] - self.tiles[batch, 0], self.tiles[batch, 3] - self.tiles[batch, 2]]
            )
            before = np.concatenate([np.zeros((2, 1), np.int64), tokens.cumsum(1)], 1)
            low = np.minimum(low, high)
            turns += int((high - low).sum())
            passed += (before[:, high] - before[:, low]).sum(1)
        return turns, *passed.tolist()

    def column_turns(self, block_m: int, *, long: bool) -> tuple[int, int]:
        """(turns, rows passed) of aim_columns and attend_columns; `long`: tiles of long segments too."""
        rows = (self.tiles[:, 5] - self.tiles[:, 4]) * self._wanted(long)
        return int((-(-rows // block_m)).sum()), int(rows.sum())

    def tile_count(self, *, long: bool = True) -> int:
        return int(self._wanted(long).sum())

    def seen(self, side: int) -> int:
        """Pairs (row, token it sees)."""
        used = np.arange(self.row_limit) < self.counts[:, :1]
        return int(((self.rows[:, 3 + 2 * side] - self.rows[:, 2 + 2 * side]).clip(min=0) * used).sum())

    def seen_products(self, side: int, other: int) -> int:
        """Over pairs (row, token it sees on `side`), the tokens that the token's segment has on `other`."""
        total = 0
        for batch in range(self.batch):
            used = self.rows[batch, :, : self.counts[batch, 0]]
            before = np.concatenate([[0], np.cumsum(self._partners(batch, side, other))])
            total += int((before[used[3 + 2 * side]] - before[used[2 + 2 * side]]).sum())
        return total

    def segment_products(self, *powers: int) -> int:
        """Sum over segments of teacher tokens ** first times student tokens ** second."""
        total = 0
        for sizes in (self._sizes(batch) for batch in range(self.batch)):
            total += int((sizes[0] ** powers[0] * sizes[1] ** powers[1]).sum())
        return total

    def _by_block(self, low: int, high: int, block_m: int):
        """First and last of a range over the used rows of each block; empty for blocks without a row."""
        blocks = self.row_blocks(block_m)
        padding = ((0, 0), (0, blocks * block_m - self.row_limit))
        used = np.pad(np.arange(self.row_limit) < self.counts[:, :1], padding)
        lows = np.where(used, np.pad(self.rows[:, low], padding), 2**31 - 1).reshape(self.batch, blocks, block_m)
        highs = np.where(used, np.pad(self.rows[:, high], padding), 0).reshape(self.batch, blocks, block_m)
        return lows.min(2), highs.max(2)

    def _wanted(self, long: bool) -> np.ndarray:
        wanted = np.arange(self.tiles.shape[2]) < self.counts[:, 1:2]
        return wanted if long else wanted & (self.tiles[:, 6] < 0)

    def _sizes(self, batch: int) -> list[np.ndarray]:
        """Tokens of each segment on each side; segments longer than a tile, which have kernels of their own, have 0."""
        count, long_count = self.counts[batch, 0], self.counts[batch, 2]
        sizes = [np.bincount(ids[batch][ids[batch] >= 0], minlength=count) for ids in self.ids]
        for size in sizes:
            size[self.long[batch, 0, :long_count]] = 0
        return sizes

    def _partners(self, batch: int, side: int, other: int) -> np.ndarray:
        ids = self.ids[side][batch]
        return np.append(self._sizes(batch)[other], 0)[np.where(ids >= 0, ids, -1)]
