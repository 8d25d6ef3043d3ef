"""Merkle trees of RFC 6962 (and RFC 9162, section 2.1) over SHA-256, with inclusion proofs; the standard library alone.

- `leaf_hash`: of a leaf's data; leaves and inner nodes are hashed in domains of their own (0x00, 0x01), so that none
  can pass for the other
- `tree_root`: of leaf hashes, in their order
- `inclusion_path`: what shows that a leaf is in a tree of that root
- `root_of_path`: the root that a leaf and its path lead to, for the checker to compare
"""

from collections.abc import Sequence
from hashlib import sha256

from records.errors import MalformedError


def leaf_hash(data: bytes) -> bytes:
    """Hash of a leaf's `data`, 32 bytes."""
    return sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes; of none, the SHA-256 of nothing, as the RFC has it."""
    if not leaves:
        return sha256(b"").digest()
    return _root(leaves, 0, len(leaves))


def _root(leaves: Sequence[bytes], start: int, end: int) -> bytes:
    if end - start == 1:
        return leaves[start]
    middle = start + _split(end - start)
    return _node(_root(leaves, start, middle), _root(leaves, middle, end))


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The sibling hashes from leaf `index` (from 0) up to the root; IndexError for a leaf that is not there."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"expected a leaf below {len(leaves)}, found {index}")
    path: list[bytes] = []
    start, end = 0, len(leaves)
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_root(leaves, middle, end))
            end = middle
        else:
            path.append(_root(leaves, start, middle))
            start = middle
    return path[::-1]


def root_of_path(leaf: bytes, *, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root of a tree of `size` leaves in which the hash `leaf` stands at `index`, by its `path` (RFC 9162, 2.1.3.2).

    Raises MalformedError where index, size and the path's length are not those of one tree.
    """
    if not 0 <= index < size:
        raise MalformedError(f"inclusion proof: expected an index below {size}, found {index}")
    node, number, last = leaf, index, size - 1
    for sibling in path:
        if len(sibling) != 32:
            raise MalformedError(f"inclusion proof: expected hashes of 32 bytes, found {len(sibling)}")
        if last == 0:
            raise MalformedError(f"inclusion proof: expected a shorter path for a tree of {size} leaves")
        if number & 1 or number == last:
            node = _node(sibling, node)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            node = _node(node, sibling)
        number, last = number >> 1, last >> 1
    if last != 0:
        raise MalformedError(f"inclusion proof: expected a longer path for a tree of {size} leaves")
    return node
