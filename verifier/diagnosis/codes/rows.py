"""Order of rows: whether a matrix holds the rows of another one, and in which order."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.checksums import xxh3

_ATTENTION = re.compile(
    r"(^|[._])(q|k|v|qkv|kv|query|key|value|c_attn|query_key_value)(_proj|_lin)?([._]|$)"
)


def row_digests(matrix: NDArray[Any]) -> list[int]:
    """Returns a digest of each row of a matrix [rows, cols]."""
    whole = np.ascontiguousarray(matrix)
    return [xxh3(memoryview(row)) for row in whole]


def permutation(found: Sequence[int], expected: Sequence[int]) -> NDArray[np.int64] | None:
    """Returns which expected row each row of a matrix is, as int64 [rows].

    None means that the rows are not the same ones, or not moved.

    Args:
        found: a digest of each row.
        expected: a digest of each expected row; equal rows are matched in order.
    """
    places: dict[int, list[int]] = defaultdict(list)
    for row, digest in enumerate(expected):
        places[digest].append(row)
    if len(found) != len(expected):
        return None
    order = np.empty(len(found), np.int64)
    for row, digest in enumerate(found):
        if not places[digest]:
            return None
        # Equal rows, such as rows of zeros, are matched in order.
        order[row] = places[digest].pop(0)
    return order if (order != np.arange(len(order))).any() else None


def is_attention(name: str) -> bool:
    """Whether a tensor's or module's name is that of a query, key or value projection."""
    return bool(_ATTENTION.search(name))


def head_size(config: Any) -> int | None:
    """Returns the width of an attention head from a config, or None.

    Args:
        config: a dict, or an object of transformers.
    """
    facts: dict[str, Any] = config if isinstance(config, dict) else dict(vars(config))
    size = facts.get("head_dim")
    width = facts.get("hidden_size") or facts.get("n_embd")
    heads = facts.get("num_attention_heads") or facts.get("n_head")
    if isinstance(size, int) and size > 0:
        return size
    return (
        width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None
    )


def describe_order(order: NDArray[np.int64], head: int | None) -> str:
    """Describes an order of rows: of whole heads, within heads, or any other.

    Args:
        order: int64 [rows]: which row of the source each row is.
        head: rows of one attention head, or None.
    """
    moved_rows = int(np.count_nonzero(order != np.arange(len(order))))
    first = int((order != np.arange(len(order))).argmax())
    text = f"{moved_rows} of {len(order)} rows stand in another order, first row {first}"
    # Without the width of a head, no order of heads can be told.
    if head is None or len(order) % head:
        return text
    blocks = order.reshape(-1, head)
    if (blocks - blocks[:, :1] == np.arange(head)).all() and (blocks[:, 0] % head == 0).all():
        heads = (blocks[:, 0] // head).tolist()[:16]
        return f"{text}: whole heads of {head} rows, in the order {heads}"
    within = blocks - np.arange(len(blocks))[:, None] * head
    if (within == within[0]).all() and within[0].min() == 0 and within[0].max() == head - 1:
        return f"{text}: inside each head of {head} rows, in the order {within[0].tolist()[:8]} ..."
    return text
