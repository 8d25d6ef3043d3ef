"""Merkle trees: the known answers of Certificate Transparency, the RFC's definition written out, and every wrong proof."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from records.errors import MalformedError
from records.merkle import inclusion_path, leaf_hash, root_of_path, tree_root

# The eight leaves of the reference implementations of RFC 6962, and the roots of the first 0, 1, … 8 of them.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("size", range(9))
def test_known_roots(size):
    assert tree_root([leaf_hash(data) for data in LEAVES[:size]]).hex() == ROOTS[size]


def test_five_leaves_by_hand():
    """The tree of RFC 9162, figure 5 in small: ((0 1) (2 3)) 4, with nothing but SHA-256."""

    def leaf(data: bytes) -> bytes:
        return sha256(b"\x00" + data).digest()

    def node(left: bytes, right: bytes) -> bytes:
        return sha256(b"\x01" + left + right).digest()

    a, b, c, d, e = (leaf(data) for data in LEAVES[:5])
    hashes = [leaf_hash(data) for data in LEAVES[:5]]
    assert tree_root(hashes) == node(node(node(a, b), node(c, d)), e)
    assert inclusion_path(hashes, 2) == [d, node(a, b), e]
    assert inclusion_path(hashes, 4) == [node(node(a, b), node(c, d))]


def definition(data: list[bytes]) -> bytes:
    """MTH as the RFC defines it, over the data themselves."""
    if len(data) < 2:
        return sha256(b"\x00" + data[0]).digest() if data else sha256(b"").digest()
    k = max(2**n for n in range(20) if 2**n < len(data))
    return sha256(b"\x01" + definition(data[:k]) + definition(data[k:])).digest()


@given(st.lists(st.binary(max_size=5), max_size=70))
def test_the_root_is_the_definitions_and_every_leaf_proves_itself(data):
    hashes = [leaf_hash(item) for item in data]
    root = tree_root(hashes)
    assert root == definition(data)
    for index, leaf in enumerate(hashes):
        path = inclusion_path(hashes, index)
        assert len(path) <= max(1, (len(data) - 1).bit_length())
        assert root_of_path(leaf, index=index, size=len(data), path=path) == root


@given(st.integers(2, 70), st.data())
def test_no_other_leaf_place_or_path_leads_to_the_root(size, draw):
    hashes = [leaf_hash(b"%d" % number) for number in range(size)]
    root = tree_root(hashes)
    index = draw.draw(st.integers(0, size - 1))
    path = inclusion_path(hashes, index)
    assert root_of_path(leaf_hash(b"x"), index=index, size=size, path=path) != root
    other = draw.draw(st.integers(0, size - 1).filter(lambda value: value != index))
    assert leads(hashes[index], other, size, path) != root
    place = draw.draw(st.integers(0, len(path) - 1))
    for wrong in (
        [*path[:place], path[place][::-1], *path[place + 1 :]],
        [*path[:place], *path[place + 1 :]],
        [*path, path[place]],
    ):
        assert leads(hashes[index], index, size, wrong) != root


def leads(leaf: bytes, index: int, size: int, path: list[bytes]) -> bytes | None:
    try:
        return root_of_path(leaf, index=index, size=size, path=path)
    except MalformedError:
        return None


@pytest.mark.parametrize(
    ("index", "size", "path", "message"),
    [
        (0, 0, [], "index below 0"),
        (2, 2, [b"\0" * 32], "index below 2"),
        (-1, 2, [b"\0" * 32], "index below 2"),
        (0, 1, [b"\0" * 32], "shorter path"),
        (0, 4, [b"\0" * 32], "longer path"),
        (0, 2, [b"\0" * 31], "32 bytes"),
    ],
)
def test_a_proof_of_no_tree(index, size, path, message):
    with pytest.raises(MalformedError, match=message):
        root_of_path(b"\0" * 32, index=index, size=size, path=path)


def test_a_leaf_that_is_not_there():
    with pytest.raises(IndexError, match="below 1"):
        inclusion_path([b"\0" * 32], 1)
