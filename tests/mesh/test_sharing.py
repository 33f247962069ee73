"""What was changed between two mappings is found, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import ref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh import sharing
from plexd.mesh.sharing import Shared, differing, is_in_order, with_changes

KEYS = [f"n_{number}" for number in range(8)]


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Iterator[None]:
    """Eight keys are to be several of the pieces that many are compared in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "AT_ONCE", 3)
        yield


@given(
    st.permutations(KEYS), st.permutations(KEYS), st.integers(0, 8), st.integers(0, 8), st.sets(st.sampled_from(KEYS))
)
def test_exactly_what_is_not_equal_differs(
    one: list[str], other: list[str], held: int, holds: int, changed: set[str]
) -> None:
    before = dict.fromkeys(one[:held], "same")
    after = {key: "changed" if key in changed else "same" for key in other[:holds]}
    expected = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    found = differing(before, after)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [key for key in found if key in after] == [key for key in after if key in expected]


@given(st.integers(0, 8), st.sets(st.sampled_from(KEYS)), st.sets(st.sampled_from(KEYS)), st.integers(0, 2))
def test_little_that_changed_among_much_is_found(held: int, gone: set[str], changed: set[str], come: int) -> None:
    before = dict.fromkeys(KEYS[:held], "same")
    after = {key: "changed" if key in changed else "same" for key in before if key not in gone}
    after |= {f"new_{number}": "same" for number in range(come)}
    found = differing(before, after)
    new = [f"new_{number}" for number in range(come)]
    assert found[: len(found) - len(gone & before.keys())] == [*(key for key in after if key in changed), *new]
    assert set(found[len(found) - len(gone & before.keys()) :]) == gone & before.keys()


CHANGES = st.tuples(
    st.dictionaries(st.sampled_from([*KEYS, "new_1", "new_2"]), st.integers(0, 2)), st.sets(st.sampled_from(KEYS))
)


@given(CHANGES)
def test_changed_copy_leaves_the_original_alone_and_the_rest_in_place(change: tuple[dict[str, int], set[str]]) -> None:
    put, gone = change
    original = Shared(dict.fromkeys(KEYS[:5], 0))
    copied = with_changes(original, put, gone)
    assert list(copied.items()) == [item for item in (original | put).items() if item[0] not in gone]
    assert original == dict.fromkeys(KEYS[:5], 0)


@given(CHANGES)
def test_changed_copy_remembers_what_a_comparison_finds(change: tuple[dict[str, int], set[str]]) -> None:
    put, gone = change
    original = Shared(dict.fromkeys(KEYS[:5], 0))
    copied = with_changes(original, put, gone)
    found, compared = differing(original, copied), differing(dict(original), dict(copied))
    assert sorted(found) == sorted(compared)
    assert [key for key in found if key not in original] == [key for key in compared if key not in original]
    assert is_in_order(original, copied)


def test_only_the_copy_itself_tells_by_what_it_remembers() -> None:
    """What two steps lie between is compared, and so is what only equals that from which the copy was made."""
    first = Shared({"a": 1, "b": 1})
    third = with_changes(with_changes(first, {"a": 2}), {"b": 2})
    assert sorted(differing(first, third)) == ["a", "b"]
    assert third.touched_since(first) is None
    assert third.touched_since(Shared(first)) is None
    assert with_changes({"a": 1}, {"a": 2}).touched_since({"a": 1}) is None


def test_what_was_is_kept_by_nobody_else() -> None:
    first = Shared({"a": 1})
    second = with_changes(first, {"a": 2})
    gone = ref(first)
    del first
    assert gone() is None
    assert differing({"a": 1}, second) == ["a"]


@given(st.permutations(KEYS), st.integers(0, 8), st.integers(0, 8))
def test_in_order_is_what_has_all_that_stayed_at_its_beginning(keys: list[str], held: int, holds: int) -> None:
    before, after = dict.fromkeys(KEYS[:held]), dict.fromkeys(keys[:holds])
    stayed = [key for key in before if key in after]
    assert is_in_order(before, after) == (keys[: len(stayed)] == stayed)
