"""Orthogonal matching pursuit: a vector as a sum of at most k anchors, found one anchor at a time.

C. Goddard and F. Fernandes Neto, "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit"
(https://arxiv.org/abs/2506.06607): the coefficients of a new token over shared tokens in one embedding space are used
again over the same tokens' rows in another. The pursuit is that of Y. Pati, R. Rezaiifar and P. Krishnaprasad (1993).

Each step takes the anchor with the largest |cosine| with the residual, the one that alone takes most from it; the
theory of OMP supposes anchors of length 1. scikit-learn and mergekit take the largest product, which is the same for
anchors of length 1. Otherwise long anchors would win more often, and one very long row, perhaps planted, always.

The cost is in the products of all residuals with all anchors, once a step. (Batch-OMP, Rubinstein et al. 2008, puts
k/2 rows of the anchors' Gram matrix in their place: that takes s x s numbers, and reading the rows from memory takes as
long as the products.) Where the CPU multiplies bfloat16, the products are made in it, four times as fast; a bound of
their error leaves few anchors per target that can be the best one, and full precision decides among these. Elsewhere,
on GPUs too, all are made in full precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# In units of the rounding error: a residual this short, beside the target, is none; a cosine this small means that the
# anchor depends on the chosen ones (what it has beyond them is at least as long as the cosine).
VANISHED, DEPENDENT = 16, 100
SCREEN_FROM = 1024  # anchors: with fewer the products are not what takes the time
GROUP = 64  # anchors whose largest score is looked at first
GROUPS = 32  # a target with more groups that can hold the best anchor is scored in full precision
COLUMNS = 1024  # anchors at a time in full precision
BFLOAT16_ERROR = 2**-8
OUTLIER = 8.0  # robust standard deviations, above which a token stands out


class SparseCoefficients(NamedTuple):
    """m vectors as sums over at most k of `anchors` vectors each.

    Attributes:
        indices: [m, k] int64, the anchors in the order in which they were chosen.
        values: [m, k] float32, or float64. Entries that were not needed have index 0 and value 0, and come last.
        anchors: how many there were to choose from.
    """

    indices: torch.Tensor
    values: torch.Tensor
    anchors: int


def omp_coefficients(
    targets: torch.Tensor,
    anchors: torch.Tensor,
    k: int = 64,
    *,
    block_bytes: int = 1 << 28,
    on_progress: Callable[[int, int], None] | None = None,
) -> SparseCoefficients:
    """Orthogonal matching pursuit: least squares of each target over the k anchors that it chooses one by one.

    An anchor that depends numerically on those already chosen, or is zero, is never chosen; of equal ones the first is.
    A target stops early when nothing is left of it (one of zeros: at once) or no anchor has a share in the rest.

    Args:
        targets: [m, a] floating point. Computed in float32, in float64 if either tensor is; on the tensors' device.
        anchors: [s, a], likewise.
        k: anchors per target; at most min(s, a) are used.
        block_bytes: bound of the temporary memory beside a bfloat16 copy of the anchors (2 * s * a bytes, where there
            is one, see above); at least one target is taken at a time.
        on_progress: called after each block with the targets done and m.

    Returns:
        SparseCoefficients [m, min(k, s, a)], the same ones in every run on the same machine.

    Raises:
        ValueError: shapes, devices or k that do not fit, no anchors, or a vector without a finite length.
        TypeError: tensors that are not floating point, or a k that is not an integer.
    """
    _check(targets, anchors, k, block_bytes)
    m, (s, a) = len(targets), anchors.shape
    k = min(k, s, a)
    dtype = torch.promote_types(torch.promote_types(targets.dtype, anchors.dtype), torch.float32)
    indices = torch.zeros(m, k, dtype=torch.int64, device=targets.device)
    values = torch.zeros(m, k, dtype=dtype, device=targets.device)
    with _full_precision(targets.device.type):
        room = block_bytes // 8
        lengths = _lengths(targets, "targets", room)
        dictionary = _Dictionary(anchors.detach(), dtype, room)
        bytes_each = dtype.itemsize * (k * a + 2 * k * k + 16 * a) + dictionary.bytes_each
        rows = -(-m // max(1, -(-m * bytes_each // block_bytes)))  # blocks of one size
        for start in range(0, m, max(1, rows)):
            at = slice(start, start + rows)
            length = lengths[at, None]
            directions = targets[at].detach().to(dtype) / length.masked_fill(length == 0, torch.inf).to(dtype)
            chosen, found = _pursue(directions, dictionary, k)
            indices[at], values[at] = chosen, found.double() * (length / dictionary.lengths[chosen])
            if on_progress is not None:
                on_progress(min(m, start + rows), m)
    return SparseCoefficients(indices, values, s)


def apply(coefficients: SparseCoefficients, weight: torch.Tensor, *, block_bytes: int = 1 << 28) -> torch.Tensor:
    """The sums over the rows of another table, for instance the base model's: coefficients @ weight.

    Args:
        coefficients: from `omp_coefficients`.
        weight: [s, d], floating point, on the same device: a row for each anchor, in the same order.
        block_bytes: bound of the temporary memory: so many columns of `weight` are taken at a time.

    Returns:
        [m, d] float32, float64 if the weight or the values are. Without coefficients a row is zero.

    Raises:
        ValueError: not one row for each anchor.
        TypeError: a weight that is not floating point.
    """
    indices, values, anchors = coefficients
    if not weight.is_floating_point():
        raise TypeError(f"weight: wanted floating point, got {weight.dtype}")
    if weight.ndim != 2 or len(weight) != anchors:
        raise ValueError(f"weight: wanted a row for each of the {anchors} anchors, got {tuple(weight.shape)}")
    weight = weight.detach()
    dtype = torch.promote_types(weight.dtype, values.dtype)
    out = torch.zeros(len(indices), weight.shape[1], dtype=dtype, device=weight.device)
    if indices.numel() == 0:
        return out
    at_a_time = max(1, block_bytes // (dtype.itemsize * (len(weight) + len(out))))
    for start in range(0, weight.shape[1], at_a_time):
        at = slice(start, start + at_a_time)
        out[:, at] = torch.nn.functional.embedding_bag(
            indices, weight[:, at].to(dtype).contiguous(), mode="sum", per_sample_weights=values.to(dtype)
        )
    return out


class Outliers(NamedTuple):
    """What stands out among coefficients and the rows made with them.

    Attributes:
        measures: name -> [m] float64: "sum" of a token's coefficients, "coefficients" (their length, square root of
            the sum of squares), "row" (the length of its row) and, of an untied head, "output row".
        scores: name -> [m] float64: how far the measure is from the median, see `outliers`.
        tokens: [n] int64, positions of the tokens with a score above OUTLIER, the largest first.
        empty: [e] int64, tokens without coefficients: they are left out of the medians, and have score 0.
    """

    measures: dict[str, torch.Tensor]
    scores: dict[str, torch.Tensor]
    tokens: torch.Tensor
    empty: torch.Tensor


def outliers(
    coefficients: SparseCoefficients,
    rows: torch.Tensor,
    output_rows: torch.Tensor | None = None,
) -> Outliers:
    """Tokens whose coefficients or rows are unlike the others': badly trained, badly fitted, or poisoned ones.

    A donor can be made so that a token harmless there becomes harmful with the base model's rows; its coefficients or
    its row are then unlike the others'. The rule: a token stands out when one of its measures is more than OUTLIER
    robust standard deviations (1.4826 times the median absolute deviation, that of a normal distribution) from the
    median. Lengths are compared by their logarithms, so that half and double are equally far.

    Args:
        coefficients: [m, k], from `omp_coefficients`.
        rows: [m, d], from `apply`.
        output_rows: [m, d], likewise, of a head that is not tied.

    Raises:
        ValueError: not one row for each token.
    """
    values = coefficients.values.double()
    sizes = torch.linalg.vector_norm(values, dim=1)
    measures = {"sum": values.sum(1), "coefficients": sizes}
    for name, table in (("rows", rows), ("output_rows", output_rows)):
        if table is None:
            continue
        if table.ndim != 2 or len(table) != len(values):
            raise ValueError(f"{name}: wanted one for each of the {len(values)} tokens, got {tuple(table.shape)}")
        measures[name.removesuffix("s").replace("_", " ")] = _lengths(table, name, 1 << 24)
    used = sizes > 0
    scores, largest = {}, torch.zeros_like(sizes)
    for name, measure in measures.items():
        scores[name] = torch.zeros_like(sizes)
        if used.any():
            scores[name][used] = robust_scores(measure[used] if name == "sum" else measure[used].log())
        largest = torch.maximum(largest, scores[name])
    order = largest.argsort(descending=True, stable=True)
    return Outliers(measures, scores, order[(largest > OUTLIER)[order]], (~used).nonzero()[:, 0])


def robust_scores(values: torch.Tensor) -> torch.Tensor:
    """How many robust standard deviations each value is away from the median."""
    middle = values.median()
    away = torch.where(values == middle, 0, (values - middle).abs())
    # Where most are equal to the rounding error, that is the least deviation.
    least = torch.finfo(torch.float32).eps * middle.abs().clamp_min(1)
    return away / (1.4826 * away.median()).clamp_min(least)


def _check(targets: torch.Tensor, anchors: torch.Tensor, k: int, block_bytes: int) -> None:
    for name, tensor in (("targets", targets), ("anchors", anchors)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name}: wanted a floating point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
        if tensor.ndim != 2:
            raise ValueError(f"{name}: wanted [tokens, dimensions], got {tuple(tensor.shape)}")
    if targets.shape[1] != anchors.shape[1] or targets.device != anchors.device:
        raise ValueError(
            f"targets, anchors: wanted vectors of one space on one device, got {tuple(targets.shape)} on "
            f"{targets.device} and {tuple(anchors.shape)} on {anchors.device}"
        )
    if anchors.numel() == 0:
        raise ValueError(f"anchors: wanted at least one vector, got {tuple(anchors.shape)}")
    for name, number in (("k", k), ("block_bytes", block_bytes)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name}: wanted an integer, got {type(number).__name__}")
        if number < 1:
            raise ValueError(f"{name}: wanted at least 1, got {number}")


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """No gradients, and products of float32 in float32: with less, a basis is not orthogonal."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _lengths(vectors: torch.Tensor, name: str, room: int) -> torch.Tensor:
    """[n] float64. Lengths below the normal numbers of float32 are 0."""
    parts = vectors.detach().split(max(1, room // (16 * max(1, vectors.shape[1]))))
    lengths = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in parts])
    largest = torch.finfo(torch.promote_types(vectors.dtype, torch.float32)).max
    if not (lengths <= largest).all():
        raise ValueError(f"{name}: wanted vectors of finite length, got NaN or infinity")
    return lengths.masked_fill_(lengths < torch.finfo(torch.float32).tiny, 0)


class _Dictionary:
    """The anchors, and the search for the one with the largest |cosine| with a direction."""

    def __init__(self, anchors: torch.Tensor, dtype: torch.dtype, room: int):
        self.anchors, self.dtype = anchors, dtype
        self.count, self.width = anchors.shape
        lengths = _lengths(anchors, "anchors", room)
        self.lengths = lengths.masked_fill(lengths == 0, torch.inf)
        self.screen = None
        self.bytes_each = dtype.itemsize * COLUMNS
        if self.count >= SCREEN_FROM and _multiplies_bfloat16(anchors.device):
            padded = -(-self.count // GROUP) * GROUP
            self.bytes_each += 2 * padded + 16 * GROUP
            self.screen = torch.zeros(padded, self.width, dtype=torch.bfloat16)
            errors = []
            for ids in torch.arange(self.count).split(max(1, room // (16 * self.width))):
                exact = self.units(ids)
                self.screen[ids] = exact.bfloat16()
                errors.append(torch.linalg.vector_norm(exact - self.screen[ids], dim=1).max())
            # Of the products' sums, too: they are added up in float32.
            self.error = torch.stack(errors).max() + self.width * torch.finfo(torch.float32).eps

    def units(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """[n, a] anchors of length 1; zeros stay."""
        return self.anchors[ids].to(self.dtype) / self.lengths[ids, None].to(self.dtype)

    def _cosines(self, ids: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """|cosine| of each [n] anchor with its own [n, a] direction."""
        products = self.anchors[ids].to(self.dtype).mul_(directions).sum(1)
        return products.abs_() / self.lengths[ids].to(self.dtype)

    def best(self, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For [n, a] directions the anchor with the largest |cosine| and that cosine, [n] int64 and [n]."""
        if self.screen is None:
            return self._best_of_all(directions)
        low = directions.bfloat16()
        low_error = torch.linalg.vector_norm(directions - low, dim=1).float()
        # [n, a] @ [a, s] -> [n, s]; numbers of bfloat16 from zero on are in the order of their bits, read as integers.
        scores = (low @ self.screen.T).abs_().view(torch.int16).view(len(low), GROUP, -1)
        tops = scores.amax(1)
        largest, group = tops.max(1)
        top = largest.view(torch.bfloat16).float()
        error = self.error * (1 + low_error) + low_error + 1.01 * BFLOAT16_ERROR * top
        each = torch.arange(len(low))
        first = scores[each, :, group].argmax(1) * scores.shape[2] + group
        # The best anchor is at least as good as the one with the largest score: its score is this or more. Rounded down
        # to bfloat16.
        least = self._cosines(first.clamp_max(self.count - 1), directions).float() - error
        least = (least.clamp_min(0).view(torch.int32) >> 16).to(torch.int16)
        open_groups = tops >= least[:, None]
        many = (open_groups.sum(1) > GROUPS) | (least == 0)
        index, cosine = self._best_of_some(directions, scores, least, open_groups & ~many[:, None])
        if many.any():
            index[many], cosine[many] = self._best_of_all(directions[many])
        return index, cosine

    def _best_of_some(self, directions, scores, least, open_groups) -> tuple[torch.Tensor, torch.Tensor]:
        """The same among the anchors of the open groups with at least the `least` score. Other rows get anything."""
        rows, groups = open_groups.nonzero(as_tuple=True)
        index = torch.zeros(len(least), dtype=torch.int64)
        cosine = torch.zeros(len(least), dtype=self.dtype)
        if len(rows) == 0:
            return index, cosine
        found, members = (scores[rows, :, groups] >= least[rows, None]).nonzero(as_tuple=True)
        pairs = rows[found] * self.count + members * scores.shape[2] + groups[found]
        pairs = pairs.sort().values
        rows, ids = pairs // self.count, pairs % self.count
        parts = zip(ids.split(len(least)), rows.split(len(least)), strict=True)
        exact = torch.cat([self._cosines(some, directions[of]) for some, of in parts])
        counts = rows.bincount(minlength=len(least))
        starts = counts.cumsum(0) - counts
        table = torch.full((len(least), int(counts.max())), -1, dtype=self.dtype)
        table[rows, torch.arange(len(rows)) - starts[rows]] = exact
        cosine, first = table.max(1)
        return ids[(starts + first).clamp_max(len(ids) - 1)], cosine

    def _best_of_all(self, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.zeros(len(directions), dtype=torch.int64, device=directions.device)
        cosine = torch.zeros(len(directions), dtype=self.dtype, device=directions.device)
        for start in range(0, self.count, COLUMNS):
            units = self.units(slice(start, start + COLUMNS))
            # [n, a] @ [a, COLUMNS] -> [n, COLUMNS]
            found, at = (directions @ units.T).abs_().max(1)
            better = found > cosine
            index, cosine = torch.where(better, at + start, index), torch.where(better, found, cosine)
        return index, cosine


def _multiplies_bfloat16(device: torch.device) -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and supported()


def _pursue(directions: torch.Tensor, dictionary: _Dictionary, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """OMP of [n, a] vectors of length 1 or 0 over anchors of length 1. Returns [n, k] indices and values.

    Of the chosen anchors an orthonormal basis is kept: anchors = triangle @ basis, fit = heights @ basis.
    """
    n, a = directions.shape
    options = {"dtype": directions.dtype, "device": directions.device}
    eps = torch.finfo(directions.dtype).eps
    basis = torch.zeros(n, k, a, **options)
    triangle = torch.eye(k, **options).repeat(n, 1, 1)
    heights = torch.zeros(n, k, **options)
    chosen = torch.zeros(n, k, dtype=torch.int64, device=directions.device)
    residual = directions.clone()
    length = torch.linalg.vector_norm(residual, dim=1)
    active = torch.ones(n, dtype=torch.bool, device=directions.device)
    for t in range(k):
        active &= length > VANISHED * eps
        rows = active.nonzero()[:, 0]
        if len(rows) == 0:
            break
        index, cosine = dictionary.best(residual[rows] / length[rows, None])
        active[rows] = cosine > DEPENDENT * eps
        chosen[rows, t] = index.masked_fill(~active[rows], 0)
        atoms = torch.zeros_like(residual)
        atoms[rows] = dictionary.units(index)
        # Both parts that the basis explains in one pass: of the atom, and what rounding has left of it in the residual.
        both = torch.stack((atoms, residual), 1)
        # [n, t, a] @ [n, a, 2] -> [n, t, 2]
        inside = torch.bmm(basis[:, :t], both.mT)
        both = torch.baddbmm(both, inside.mT, basis[:, :t], alpha=-1)
        beyond, residual = both[:, 0], both[:, 1]
        triangle[:, :t, t], heights[:, :t] = inside[:, :, 0], heights[:, :t] + inside[:, :, 1]
        # Cancellation has left a larger part of the basis in what is short: once more, which is enough.
        short = torch.linalg.vector_norm(beyond, dim=1) < 0.5
        _project_out(basis[:, :t], beyond, triangle[:, :t, t], short & active)
        beyond_length = torch.linalg.vector_norm(beyond, dim=1)
        active &= beyond_length > eps
        chosen[:, t].masked_fill_(~active, 0)
        unit = beyond / beyond_length.masked_fill(~active, torch.inf)[:, None]
        height = (unit * residual).sum(1)
        residual = residual - height[:, None] * unit
        basis[:, t], heights[:, t] = unit, height
        triangle[:, t, t] = torch.where(active, beyond_length, 1)
        before, length = length, torch.linalg.vector_norm(residual, dim=1)
        shrunk = active & (length < 0.1 * before) & (length > VANISHED * eps)
        if shrunk.any():
            _project_out(basis[:, : t + 1], residual, heights[:, : t + 1], shrunk)
            length = torch.linalg.vector_norm(residual, dim=1)
    values = torch.linalg.solve_triangular(triangle, heights[:, :, None], upper=True)[:, :, 0]
    return chosen, values


def _project_out(basis: torch.Tensor, vectors: torch.Tensor, inside: torch.Tensor, where: torch.Tensor) -> None:
    """Take from some [n, a] vectors what the basis explains, in place, and add its coordinates to `inside` [n, t]."""
    for rows in where.nonzero()[:, 0].split(max(1, len(vectors) // 16)):
        some = basis[rows]
        # [r, t, a] @ [r, a, 1] -> [r, t, 1]
        more = torch.linalg.vecdot(some, vectors[rows, None])
        inside[rows] += more
        vectors[rows] -= torch.bmm(more[:, None], some)[:, 0]
