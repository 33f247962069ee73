"""Elements of sets: the same however they came about, and known again in what nft tells of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh.elements import Elements, join

TYPES = ("ipv4_addr", "ipv6_addr", "inet_service", "inet_proto")
SIZES = (4, 16, 2, 1)
comments = st.sampled_from(("", "pol#0", "pol#1"))
keys = st.tuples(*(st.binary(min_size=size, max_size=size) for size in SIZES)).map(join)
held = st.dictionaries(keys, comments, max_size=5)


@given(held, st.lists(st.tuples(st.lists(keys, max_size=2), held), max_size=4))
def test_amended_ones_are_those_made_at_once(
    first: dict[bytes, str], steps: list[tuple[list[bytes], dict[bytes, str]]]
) -> None:
    elements = Elements.of(TYPES, first, counted=True)
    for unknown, added in steps:
        removed = [*unknown, *list(elements.held)[:2]]
        elements = elements.amended(removed, added)
        assert elements == Elements.of(TYPES, elements.held, counted=True)
        assert added.keys() <= elements.held.keys()
        assert not (set(removed) - added.keys()) & elements.held.keys()


@given(held, held)
def test_difference_leads_from_the_ones_to_the_others(old: dict[bytes, str], new: dict[bytes, str]) -> None:
    removed, added = Elements.of(TYPES, old, counted=True).difference(Elements.of(TYPES, new, counted=True))
    assert set(removed) <= old.keys()
    assert {**{key: old[key] for key in old.keys() - set(removed)}, **added} == new
    assert not (old.keys() - set(removed)) & added.keys()  # what is there the kernel would not add again


def told(elements: Elements) -> list[Any]:
    """As nft tells them: counted."""
    return [
        {"elem": {**element["elem"], "counter": {"packets": 1, "bytes": 84}}} if elements.counted else element
        for element in elements.to_json()
    ]


@given(held, held, st.booleans())
def test_what_nft_tells_of_them_is_known_again_and_nothing_else(
    one: dict[bytes, str], other: dict[bytes, str], counted: bool
) -> None:
    if not counted:
        one, other = dict.fromkeys(one, ""), dict.fromkeys(other, "")
    mine, theirs = (Elements.of(TYPES, each, counted=counted) for each in (one, other))
    assert mine.are_in([*reversed(told(mine))])
    assert mine.are_in(told(theirs)) == (one == other)


PLAIN = Elements.of(("ipv4_addr",), {bytes([10, 0, 0, 1]): ""})
COUNTED = Elements.of(("inet_service",), {b"\0\x16": "pol#0"}, counted=True)


@pytest.mark.parametrize(
    ("elements", "strange"),
    [
        (PLAIN, "10.0.0.2"),
        (PLAIN, "host"),
        (PLAIN, 1),
        (PLAIN, {"prefix": {"addr": "10.0.0.0", "len": 24}}),
        (PLAIN, {"concat": ["10.0.0.1", 22]}),
        (PLAIN, {"elem": {"val": "10.0.0.1", "comment": "theirs"}}),
        (PLAIN, {"elem": {"val": "10.0.0.1", "timeout": 60}}),
        (COUNTED, 22),
        (COUNTED, {"elem": {"val": 22, "comment": "pol#0"}}),
        (COUNTED, {"elem": {"val": 99999, "comment": "pol#0", "counter": {}}}),
        (COUNTED, {"elem": {"val": "ssh", "comment": "pol#0", "counter": {}}}),
        (COUNTED, {"elem": {"val": 22, "counter": {}}}),
    ],
)
def test_element_of_somebody_else_is_none_of_them(elements: Elements, strange: Any) -> None:
    assert elements.are_in(told(elements))
    assert not elements.are_in([strange])
