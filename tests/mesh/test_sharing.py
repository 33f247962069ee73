"""What was changed between two mappings is found, by identity and wherever it stands."""

from __future__ import annotations

from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh.sharing import differing, with_entry, without_entry

KEYS = [f"n_{number}" for number in range(8)]


@given(
    st.permutations(KEYS), st.permutations(KEYS), st.integers(0, 8), st.integers(0, 8), st.sets(st.sampled_from(KEYS))
)
def test_exactly_what_is_not_the_very_same_differs(
    one: list[str], other: list[str], held: int, holds: int, changed: set[str]
) -> None:
    values = {key: [key] for key in KEYS}
    before = {key: values[key] for key in one[:held]}
    after = {key: list(values[key]) if key in changed else values[key] for key in other[:holds]}
    expected = {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}
    found = differing(before, after)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [key for key in found if key in after] == [key for key in after if key in expected]


@given(st.booleans(), st.sampled_from(KEYS))
def test_changed_copy_leaves_the_original_alone_and_the_rest_in_place(viewed: bool, key: str) -> None:
    original = dict.fromkeys(KEYS[:5], 0)
    given_one = MappingProxyType(original) if viewed else original
    assert list(with_entry(given_one, key, 1).items()) == list((original | {key: 1}).items())
    assert list(without_entry(given_one, key).items()) == [item for item in original.items() if item[0] != key]
    assert original == dict.fromkeys(KEYS[:5], 0)
