r"""How many numbers move between a slow memory and a fast one of M numbers, for each order of computing attention.

    scores and weights written out     4 N^2 + 2 N^2 d / \sqrt{M} + \dots
    rows stay, keys pass by (tiles)    4 N^2 d^2 / M
    squares of scores                  5 N^2 d / \sqrt{M}
    any order                          \ge \max(inputs + outputs, N^2 d / (M / d + \sqrt{M}) - M)

for N rows and N keys of width d, to leading order; the functions count to the last number, with ragged blocks. What is
in the fast memory is free. "The I/O Complexity of Attention, or How Optimal is Flash Attention?" shows that the second
order is the best there is for M >= d^2, and N^2 d / \sqrt{M} the best below, within a constant that it does not state;
`lower_bound` has one, and its derivation.

Nothing here runs attention, nor imports torch; `foveate.core.counting` runs three of the orders and counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from foveate.core.errors import BadInput

__all__ = [
    "Shape",
    "Traffic",
    "block_sparse",
    "lower_bound",
    "naive",
    "regime",
    "rows_that_fit",
    "shared_prefix",
    "side_that_fits",
    "small_memory",
    "split",
    "tiled",
]

# rows and keys of the blocks of a block-sparse pattern, where nothing else is said
BLOCK = 64
# parts of the keys, where nothing else is said
PARTS = 8


@dataclass(frozen=True)
class Shape:
    """The shape of an attention call.

    Args:
        queries: Rows.
        keys: Keys.
        dim: Width of a query and of a key.
        value_dim: Width of a value; None: as a key.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key-value heads.
        causal: Whether a row sees no key behind itself; the last row stands at the last key.
        density: Share of the key blocks that a pattern visits.
        prefix: First keys that all sequences of the batch have in common.

    Raises:
        BadInput: numbers that no attention call has.
    """

    queries: int
    keys: int
    dim: int
    value_dim: int | None = None
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    causal: bool = False
    density: float = 1.0
    prefix: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name == "prefix" else 1
            if f.name in ("causal", "density") or (f.name == "value_dim" and value is None):
                continue
            if not whole(value, least):
                raise BadInput(f"Shape({f.name}={value!r}): {f.name} must be a whole number, {least} or more")
        if not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise BadInput(f"Shape(density={self.density!r}): density must be above 0 and at most 1")
        if self.heads % self.kv_heads:
            raise BadInput(f"Shape(heads={self.heads}, kv_heads={self.kv_heads}): heads must be a multiple of kv_heads")
        if self.prefix > self.keys:
            raise BadInput(f"Shape(prefix={self.prefix}): there are {self.keys} keys; prefix must be at most that")
        if self.causal and self.queries > self.keys:
            raise BadInput(
                f"Shape(queries={self.queries}, keys={self.keys}, causal=True): the first rows would see nothing; give "
                "at least as many keys as queries"
            )

    @property
    def width(self) -> int:
        """Width of a value."""
        return self.dim if self.value_dim is None else self.value_dim

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows that share the keys of one key-value head in one sequence."""
        return self.group * self.queries

    def inputs(self) -> int:
        """Numbers that must be read at least once."""
        # a pattern must visit as many keys as one row's scores can make up for, and all where it is full
        seen = -(-self.scores() // (self.batch * self.heads * self.queries)) if self.density < 1 else self.keys
        keys = seen + (self.batch - 1) * max(0, seen - self.prefix)
        return self.batch * self.heads * self.queries * self.dim + self.kv_heads * keys * (self.dim + self.width)

    def outputs(self) -> int:
        """Numbers that must be written at least once."""
        return self.batch * self.heads * self.queries * self.width

    def scores(self) -> int:
        """Scores that must be computed."""
        hidden = self.queries * (self.queries - 1) // 2 if self.causal else 0
        return math.ceil(self.density * self.batch * self.heads * (self.queries * self.keys - hidden))


@dataclass(frozen=True)
class Traffic:
    """What moves, in numbers.

    Args:
        read: Numbers read from slow memory.
        written: Numbers written to it.
        terms: The same by what they are; their sum is the total.
    """

    read: int
    written: int
    terms: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, read: dict[str, int], written: dict[str, int]) -> Traffic:
        """From what is read and what is written, by what it is."""
        terms = {name: read.get(name, 0) + written.get(name, 0) for name in (read | written)}
        return cls(sum(read.values()), sum(written.values()), {name: n for name, n in terms.items() if n})

    @property
    def total(self) -> int:
        """Read and written."""
        return self.read + self.written

    def bytes(self, itemsize: int = 4) -> int:
        """The total in bytes, for numbers of so many bytes."""
        return self.total * itemsize

    def times(self, count: int) -> Traffic:
        """The same so many times."""
        return Traffic(self.read * count, self.written * count, {name: n * count for name, n in self.terms.items()})

    def __add__(self, other: Traffic) -> Traffic:
        terms = {name: self.terms.get(name, 0) + other.terms.get(name, 0) for name in (self.terms | other.terms)}
        return Traffic(self.read + other.read, self.written + other.written, terms)


# ---------------------------------------------------------------- block sizes


def whole(value: object, least: int) -> bool:
    """Whether it is a whole number, and not below the least one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def even(length: int, most: int) -> int:
    """Size of the fewest blocks of at most `most`, dealt out evenly; the last one may be shorter."""
    return -(-length // -(-length // most))


def rows_that_fit(shape: Shape, fast: int, keys: int = 1) -> int:
    """Rows per row block of the tiled form: those that fit beside key blocks of `keys` keys.

    Each row holds its query, its output, the maximum, the sum and the factor of the running softmax, and its scores;
    a key block and its value block come in after each other.

    Raises:
        BadInput: not even one row fits.
    """
    block, row = keys * max(shape.dim, shape.width), shape.dim + shape.width + 3 + keys
    if not whole(fast, block + row):
        raise BadInput(
            f"fast memory of {fast} numbers: a row and {keys} keys of width {shape.dim} need {block + row}; give that "
            "or more, or take small_memory, which needs 6"
        )
    return (fast - block) // row


def side_that_fits(fast: int) -> int:
    r"""Side t of the squares of `small_memory`: t^2 scores and five columns of t numbers, t = \sqrt{M} nearly.

    Raises:
        BadInput: not even a single score fits.
    """
    if not whole(fast, 6):
        raise BadInput(f"fast memory of {fast} numbers: a square of scores and its columns need 6 or more")
    return (math.isqrt(25 + 4 * fast) - 5) // 2


def product_blocks(rows: int, columns: int, fast: int) -> tuple[int, int]:
    """Rows and columns of the block of a matrix product that is held while a column and a row of its factors pass by.

    Raises:
        BadInput: not even a single entry fits.
    """
    if not whole(fast, 3):
        raise BadInput(f"fast memory of {fast} numbers: an entry of a matrix product needs 3 or more")
    wide = even(columns, math.isqrt(fast + 1) - 1)
    high = min(rows, (fast - wide) // (wide + 1))
    if high == rows:
        wide = even(columns, (fast - high) // (high + 1))
    return even(rows, high), wide


def row_blocks(shape: Shape, most: int) -> Iterator[tuple[int, int]]:
    """The row blocks of one key-value head in one sequence: how many rows each has, and keys its last one sees.

    The rows of the heads that share a key stand together, by position.
    """
    size = even(shape.rows, most)
    for first in range(0, shape.rows, size):
        last = min(first + size, shape.rows)
        behind = shape.queries - 1 - (last - 1) // shape.group
        yield last - first, shape.keys - (behind if shape.causal else 0)


# ---------------------------------------------------------------- orders


def naive(shape: Shape, fast: int) -> Traffic:
    """Scores and weights go to slow memory and come back, masked or not.

    Two matrix products, each by the largest square blocks that fit, and a softmax between them, for which a row is read
    once where it fits and twice where it does not.

    Args:
        shape: Of the call.
        fast: Numbers that the fast memory holds.
    """
    rows, keys, width = shape.rows, shape.keys, shape.width
    high, wide = product_blocks(rows, keys, fast)
    tall, broad = product_blocks(rows, width, fast)
    read = {
        "queries": -(-keys // wide) * rows * shape.dim,
        "keys and values": -(-rows // high) * keys * shape.dim + -(-rows // tall) * keys * width,
        "scores": (1 if keys + 2 <= fast else 2) * rows * keys,
        "weights": -(-width // broad) * rows * keys,
    }
    written = {"scores": rows * keys, "weights": rows * keys, "outputs": rows * width}
    return Traffic.of(read, written).times(shape.batch * shape.kv_heads)


def tiled(shape: Shape, fast: int, keys: int = 1) -> Traffic:
    """Rows stay with their running softmax while the keys that they see pass by: FlashAttention, 4 N^2 d^2 / M.

    Args:
        shape: Of the call.
        fast: Numbers that the fast memory holds.
        keys: Keys per key block. One moves least; matrix units want more, and blocks behind the mask are skipped.

    Raises:
        BadInput: not even one row fits.
    """
    passed = sum(
        min(shape.keys, -(-sees // keys) * keys) for _, sees in row_blocks(shape, rows_that_fit(shape, fast, keys))
    )
    read = {"queries": shape.rows * shape.dim, "keys and values": passed * (shape.dim + shape.width)}
    return Traffic.of(read, {"outputs": shape.rows * shape.width}).times(shape.batch * shape.kv_heads)


def small_memory(shape: Shape, fast: int) -> Traffic:
    r"""Squares of scores stay while columns of queries, keys, values and outputs pass by: 5 N^2 d / \sqrt{M}.

    The better order where M < d^2: there a row block of the tiled form has few rows, as each takes 2 d numbers.

    Args:
        shape: Of the call.
        fast: Numbers that the fast memory holds.

    Raises:
        BadInput: not even a single score fits.
    """
    side = side_that_fits(fast)
    wide = even(shape.keys, side)
    squares = passed = again = 0
    for rows, sees in row_blocks(shape, side):
        count = -(-sees // wide)
        squares += count * rows
        again += (count - 1) * rows
        passed += min(shape.keys, count * wide)
    # the first square of a row block finds no outputs yet, the last one leaves the final ones
    read = {
        "queries": squares * shape.dim,
        "keys and values": passed * (shape.dim + shape.width),
        "partial outputs": again * shape.width,
    }
    written = {"partial outputs": again * shape.width, "outputs": shape.rows * shape.width}
    return Traffic.of(read, written).times(shape.batch * shape.kv_heads)


def split(shape: Shape, fast: int, parts: int = PARTS) -> Traffic:
    """Keys are split over work items, each with a fast memory of its own; partial outputs are merged by their lse.

    What one decoded token needs to keep more than one processor busy. A row block that sees none of a part's keys is
    not there in that part.

    Args:
        shape: Of the call.
        fast: Numbers that the fast memory of each work item holds.
        parts: Work items per key-value head.

    Raises:
        BadInput: not even one row fits, or no number of parts.
    """
    if not whole(parts, 1):
        raise BadInput(f"split(parts={parts!r}): parts must be a whole number, 1 or more")
    size = even(shape.keys, -(-shape.keys // parts))
    if size == shape.keys:
        return tiled(shape, fast)
    blocks = list(row_blocks(shape, rows_that_fit(shape, fast)))
    there = passed = 0
    for first in range(0, shape.keys, size):
        for rows, sees in blocks:
            passed += max(0, min(sees, first + size, shape.keys) - first)
            there += rows if sees > first else 0
    read = {"queries": there * shape.dim, "keys and values": passed * (shape.dim + shape.width)}
    return (Traffic.of(read, {}) + merged(there, shape.rows, shape.width)).times(shape.batch * shape.kv_heads)


def merged(partial: int, rows: int, width: int) -> Traffic:
    """Partial outputs with their lse are written, read again, and make the outputs of so many rows."""
    moved = {"partial outputs": partial * (width + 1)}
    return Traffic.of(moved, moved | {"outputs": rows * width})


def block_sparse(
    shape: Shape, fast: int, *, rows: int = BLOCK, keys: int = BLOCK, visited: int | None = None
) -> Traffic:
    """Row blocks visit some of the key blocks, which a list names: `shape.density` of those that the mask leaves.

    Each head has visits of its own, so that heads do not share what passes by, and a fast memory that holds more than
    `rows` rows does not help. In one that holds fewer, a row block is cut and its key blocks pass by again.

    Args:
        shape: Of the call.
        fast: Numbers that the fast memory holds.
        rows: Rows per row block of the pattern.
        keys: Keys per key block of the pattern.
        visited: Pairs of a row and a key block that one head visits; None: by the density.

    Raises:
        BadInput: not even one row fits, or more visits than there are pairs.
    """
    head = Shape(shape.queries, shape.keys, shape.dim, shape.value_dim, causal=shape.causal)
    most = rows_that_fit(head, fast)
    pairs = passed = 0
    for first in range(0, head.queries, rows):
        last = min(first + rows, head.queries)
        sees = head.keys - (head.queries - last if head.causal else 0)
        blocks = -(-sees // keys)
        pairs += blocks
        passed += -(-(last - first) // most) * min(head.keys, blocks * keys)
    count = math.ceil(shape.density * pairs) if visited is None else visited
    if not whole(count, 1) or count > pairs:
        raise BadInput(f"block_sparse(visited={visited!r}): there are {pairs} pairs; visited must be from 1 to that")
    read = {
        "queries": head.rows * head.dim,
        # a ragged last block weighs as much as the mean
        "keys and values": -(-passed * count // pairs) * (head.dim + head.width),
        "list of blocks": count,
    }
    return Traffic.of(read, {"outputs": head.outputs()}).times(shape.batch * shape.heads)


def shared_prefix(shape: Shape, fast: int) -> Traffic:
    """The first `shape.prefix` keys are held once and pass by the rows of all sequences together; Hydragen.

    Each sequence's other keys pass by its own rows, and both partial outputs are merged by their lse. Without sharing
    the same call moves `tiled(shape, fast)`.

    Args:
        shape: Of the call.
        fast: Numbers that the fast memory holds.

    Raises:
        BadInput: not even one row fits, or rows that do not see the whole prefix.
    """
    own = shape.keys - shape.prefix
    if not shape.prefix:
        return tiled(shape, fast)
    if shape.causal and shape.queries > max(1, own):
        raise BadInput(
            f"shared_prefix: {shape.queries} causal rows on {shape.keys} keys do not all stand behind a prefix of "
            f"{shape.prefix}; give at most {max(1, own)} queries"
        )
    # rows of all sequences are to the prefix as the rows of more heads that share its keys
    every = shape.batch * shape.group
    whole_prefix = Shape(shape.queries, shape.prefix, shape.dim, shape.value_dim, heads=every)
    first = tiled(whole_prefix, fast).times(shape.kv_heads)
    if not own:
        return first
    rest = tiled(replace(shape, keys=own, prefix=0), fast)
    rows = shape.batch * shape.heads * shape.queries
    read = {name: first.terms[name] + rest.terms[name] for name in ("queries", "keys and values")}
    return Traffic.of(read, {}) + merged(2 * rows, rows, shape.width)


# ---------------------------------------------------------------- bounds


def lower_bound(shape: Shape, fast: int) -> int:
    r"""What any order moves at least that forms each score as the sum of its d products.

        \max(inputs + outputs, T d / (M / d + \sqrt{M}) - M)    for T scores

    The paper's theorems give the order of magnitude, N^2 d^2 / M for M >= d^2 and N^2 d / \sqrt{M} below; the constants
    are derived here. Cut the run into segments of M transfers.

    - Scores all of whose products are formed in one segment belong to a rows and b keys that are at hand in it. At hand
      are M numbers at its start and M that come in, so (a + b) d <= 2 M, and they have a b d <= M^2 / d products.
    - Every other score that is touched has a partial sum that is there at the start, comes in, goes out, or is there at
      the end. With the queries and keys at hand that makes 3 M numbers at most, and by Loomis and Whitney no more than
      (3 M / 3)^{3/2} = M^{3/2} products.

    So T d products take at least T d / (M^2 / d + M^{3/2}) - 1 segments of M transfers each. To compute a score twice
    does not help: only the products of the one that is used are counted. Fast matrix multiplication does not form all
    products; it escapes this bound, and for M >= d^2 not the paper's.

    Args:
        shape: Of the call.
        fast: Numbers that the fast memory holds.
    """
    return max(shape.inputs() + shape.outputs(), math.ceil(by_products(shape, fast)))


def by_products(shape: Shape, fast: int) -> float:
    """The part of the bound that grows with the number of scores."""
    return shape.scores() * shape.dim / (fast / shape.dim + math.sqrt(fast)) - fast


def regime(shape: Shape, fast: int) -> str:
    """Which form the bound takes: "N^2 d / sqrt(M)", "N^2 d^2 / M", or "N d" where reading all once says more."""
    if by_products(shape, fast) <= shape.inputs() + shape.outputs():
        return "N d"
    return "N^2 d^2 / M" if fast >= shape.dim**2 else "N^2 d / sqrt(M)"
