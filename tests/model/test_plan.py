"""The plan of a tick against a naive walk over its rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellserve_model.plan import Capture, Places, TokenPlan, plan_tick
from cellserve_model.ticks import Want

_HEAD_AFTER = Want.NEXT_TOKEN | Want.TOP_K | Want.LOGITS

Moment = tuple[int, int]  # a row, and how many of its tokens it has consumed


@st.composite
def ticks(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    want = st.sampled_from([0, 1, 2, 4, 5, 8, 16, 32, 63])
    wants = draw(
        st.one_of(st.lists(want, min_size=sum(counts), max_size=sum(counts)), want.map(lambda w: [w] * sum(counts)))
    )
    return counts, wants


def _order(order: NDArray[np.int64] | None, size: int) -> list[int]:
    return list(range(size)) if order is None else order.tolist()


def _numbers(places: Places) -> list[int]:
    return list(range(places.start, places.stop)) if isinstance(places, slice) else places.tolist()


def _recorded(captures: list[Capture | None], rows: list[int], step_sizes: list[int]) -> dict[int, Moment]:
    """What stands at each place once every capture has been done."""
    found: dict[int, Moment] = {}
    for consumed, (capture, size) in enumerate(zip(captures, [len(rows), *step_sizes], strict=True)):
        if capture is not None:
            ranks = list(range(size)) if capture.ranks is None else capture.ranks.tolist()
            for rank, place in zip(ranks, _numbers(capture.places), strict=True):
                assert place not in found
                found[place] = (rows[rank], consumed)
    return found


@given(ticks())
def test_every_token_is_stepped_once_in_its_row_and_every_output_finds_its_moment(
    tick: tuple[list[int], list[int]],
) -> None:
    counts, wants = tick
    plan = plan_tick(np.array(counts), np.array(wants, dtype=np.uint8))
    rows = _order(plan.order, len(counts))
    owner = [(row, consumed) for row, count in enumerate(counts) for consumed in range(count)]
    order = _order(plan.token_order, len(owner))
    taken = 0
    for step, size in enumerate(plan.step_sizes):
        for rank in range(size):
            assert owner[order[taken + rank]] == (rows[rank], step)
        taken += size
    assert taken == len(owner)

    def after(bit: int) -> list[Moment]:
        return [(row, consumed + 1) for (row, consumed), want in zip(owner, wants, strict=True) if want & bit]

    before = [moment for moment, want in zip(owner, wants, strict=True) if want & Want.LOGPROB]
    if plan.head is None:
        assert not after(_HEAD_AFTER)
        assert not before
    else:
        recorded = _recorded(plan.head.captures, rows, plan.step_sizes)
        assert sorted(recorded) == list(range(plan.head.num_moments))
        # Nothing is computed that nobody asked for, and nothing twice.
        assert sorted(recorded.values()) == sorted(set(after(_HEAD_AFTER)) | set(before))
        for places, expected in (
            (plan.head.next_tokens, after(Want.NEXT_TOKEN)),
            (plan.head.top_k, after(Want.TOP_K)),
            (plan.head.logits, after(Want.LOGITS)),
            (plan.head.logprobs, before),
        ):
            assert [recorded[place] for place in _numbers(places)] == expected
        assert [owner[token] for token in _numbers(plan.head.logprob_tokens)] == before
    for tokens, bit in ((plan.states, Want.STATE), (plan.gates, Want.GATES)):
        _check_tokens(tokens, after(bit), rows, plan.step_sizes)


def _check_tokens(tokens: TokenPlan | None, expected: list[Moment], rows: list[int], step_sizes: list[int]) -> None:
    if tokens is None:
        assert not expected
        return
    recorded = _recorded(tokens.captures, rows, step_sizes)
    assert tokens.num_tokens == len(expected)
    assert [recorded[place] for place in range(tokens.num_tokens)] == expected


@pytest.mark.parametrize(("counts", "num_tokens"), [([1, 1], 3), ([0, 2], 2), ([2, 2], 3), ([2, -1, 1], 2)])
def test_counts_that_do_not_fit_the_tokens_are_refused(counts: list[int], num_tokens: int) -> None:
    with pytest.raises(ValueError, match="counts must be at least 1 and sum to the number of tokens"):
        plan_tick(np.array(counts), np.zeros(num_tokens, dtype=np.uint8))
