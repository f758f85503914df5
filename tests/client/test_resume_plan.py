"""What is replayed and sent again after an attach, against a server that is nothing but a list of tokens."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve._resume import ResumePlan, UnansweredRun, plan_resume
from cellserve.errors import TokensLost


def runs(*bounds: tuple[int, int]) -> list[UnansweredRun]:
    return [UnansweredRun(begin, end) for begin, end in bounds]


def given_up(begin: int, end: int, *, told: bool = False) -> UnansweredRun:
    return UnansweredRun(begin, end, is_waited_for=False, will_be_repeated=told)


def plan(position: int, confirmed: int, kept_start: int | None, unanswered: list[UnansweredRun]) -> ResumePlan:
    return plan_resume(position, confirmed, kept_start, unanswered, "a")


def test_a_server_that_stands_where_it_should_gets_what_was_not_answered() -> None:
    assert plan(10, 10, 4, runs((10, 12), (12, 13))) == ResumePlan(replays=False, num_runs=2)


def test_a_server_that_has_run_what_was_not_answered_is_asked_for_it_all_the_same() -> None:
    assert plan(13, 10, None, runs((10, 12), (12, 13))) == ResumePlan(replays=False, num_runs=2)
    assert plan(12, 10, None, runs((10, 12), (12, 13))) == ResumePlan(replays=False, num_runs=2)


def test_a_server_that_came_back_with_an_older_state_gets_the_kept_tokens_first() -> None:
    assert plan(4, 10, 4, runs((10, 12))) == ResumePlan(replays=True, num_runs=1)
    assert plan(7, 10, 4, []) == ResumePlan(replays=True, num_runs=0)


@pytest.mark.parametrize(("position", "kept_start"), [(3, 4), (9, None)])
def test_a_session_whose_tokens_are_gone_cannot_be_made_whole(position: int, kept_start: int | None) -> None:
    with pytest.raises(TokensLost) as lost:
        plan(position, 10, kept_start, [])
    assert (lost.value.position, lost.value.session_id, lost.value.code) == (position, "a", "DATA_LOSS")


def test_a_position_inside_a_run_is_nobodys_doing_that_could_be_mended() -> None:
    with pytest.raises(TokensLost, match="inside"):
        plan(11, 10, None, runs((10, 12)))


def test_a_run_given_up_that_has_not_run_never_runs_nor_what_was_built_on_it() -> None:
    unanswered = [*runs((10, 12)), given_up(12, 14), *runs((14, 15))]
    assert plan(12, 10, None, unanswered).num_runs == 1
    assert plan(10, 10, None, unanswered).num_runs == 1


def test_a_run_given_up_that_has_run_is_taken_over() -> None:
    assert plan(14, 10, None, [*runs((10, 12)), given_up(12, 14)]).num_runs == 2
    assert plan(14, 10, None, [given_up(10, 12), *runs((12, 14))]).num_runs == 2


def test_a_run_that_its_caller_will_repeat_leaves_the_position_to_the_repeat() -> None:
    assert plan(12, 10, None, [given_up(10, 12, told=True)]).num_runs == 0
    assert plan(14, 10, None, [*runs((10, 12)), given_up(12, 14, told=True)]).num_runs == 1
    # But where others follow it, it was not the last word.
    assert plan(14, 10, None, [given_up(10, 12, told=True), *runs((12, 14))]).num_runs == 2


@dataclass(frozen=True)
class Case:
    """consumed: all tokens that the client has sent. durable, position: the server's, after it died and came back."""

    consumed: list[int]
    confirmed: int
    kept_start: int
    position: int
    unanswered: list[UnansweredRun]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    confirmed = draw(st.integers(0, 12))
    ends, begin = [], confirmed
    for count in draw(st.lists(st.integers(1, 4), max_size=5)):
        ends.append((begin, begin + count))
        begin += count
    kept_start = draw(st.integers(0, confirmed))
    # What a server can stand at: anything confirmed that is kept, or the end of a run.
    position = draw(st.sampled_from([*range(kept_start, confirmed + 1), *(end for _, end in ends)]))
    waited = draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends)))
    unanswered = [
        UnansweredRun(first, last, is_waited_for=one) for (first, last), one in zip(ends, waited, strict=True)
    ]
    return Case(list(range(100, 100 + begin)), confirmed, kept_start, position, unanswered)


@given(cases())
def test_after_the_plan_the_server_has_every_token_once_and_in_order(case: Case) -> None:
    server = case.consumed[: case.position]
    done = plan_resume(case.position, case.confirmed, case.kept_start, case.unanswered, "a")
    if done.replays:
        server += case.consumed[case.position : case.confirmed]
    for run in case.unanswered[: done.num_runs]:
        if run.end <= len(server):
            continue  # the answer that is held
        assert run.begin == len(server)
        assert run.is_waited_for  # nothing that was given up is begun
        server += case.consumed[run.begin : run.end]
    assert server == case.consumed[: len(server)]
    assert len(server) >= case.confirmed
    settled = case.unanswered[done.num_runs :]
    # Only what begins with a run given up that has not run is left out, and it leaves no hole.
    assert not settled or (not settled[0].is_waited_for and settled[0].begin == len(server))
