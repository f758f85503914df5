"""What is kept until it is durable, against a plain list."""

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve._kept import KeptTokens, KeptVectors

TOKEN = st.integers(0, 2**32 - 1)
ADD = st.tuples(st.just("add"), st.lists(TOKEN, min_size=1, max_size=6))
PRUNE = st.tuples(st.just("prune"), st.integers(-3, 30))
RESTART = st.tuples(st.just("restart"), st.integers(0, 50))
CHANGES = st.lists(st.one_of(ADD, ADD, PRUNE, RESTART), max_size=30)


@pytest.mark.parametrize("holds_vectors", [False, True])
@given(start=st.integers(0, 20), changes=CHANGES)
def test_what_is_kept_is_what_came_and_is_not_safe_yet(
    holds_vectors: bool, start: int, changes: list[tuple[str, list[int] | int]]
) -> None:
    kept = KeptVectors(start) if holds_vectors else KeptTokens(start)
    begin, model = start, list[int]()
    for change, value in changes:
        if isinstance(value, list):
            column = [token % 1000 for token in value] if holds_vectors else value
            if holds_vectors:
                kept.add(np.array(column, dtype=np.float32)[:, None])
            elif len(column) == 1:
                kept.add(column[0])
            else:
                kept.add(array("I", column))
            model += column
        elif change == "prune":
            num_safe = max(0, min(begin + value - begin, len(model)))
            kept.prune(begin + value)
            model, begin = model[num_safe:], begin + num_safe
        else:
            kept.restart(value)
            begin, model = value, []
        assert (kept.start, kept.end) == (begin, begin + len(model))
        for first in range(len(model)):
            for last in range(first + 1, len(model) + 1):
                cut = kept.cut(begin + first, begin + last)
                plain = cut[:, 0].tolist() if isinstance(cut, np.ndarray) else list(cut)
                assert plain == model[first:last]


def test_a_vector_that_its_owner_changes_afterwards_is_kept_as_it_was() -> None:
    from cellserve._tokens import vector_column

    owned = np.ones((1, 3), dtype=np.float32)
    column = vector_column(owned, 3)
    owned[:] = 7
    assert column.tolist() == [[1, 1, 1]]
