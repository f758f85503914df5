"""The chains of runs: held answers first, then unfinished runs, whatever is taken out of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cellserve_service.runs import Kind, RunTable, Status
from cellserve_service.sessions import NO_RUN, SessionTable
from tests.service.profiles import QUICK


class _Chains:
    """Three sessions with runs of some tokens each; every run's words are its number, repeated."""

    def __init__(self) -> None:
        self.sessions = SessionTable(3)
        self.rows = self.sessions.create("abc", 0, 7, 0.0)
        self.table = RunTable(self.sessions, np.uint32, 1)
        self.table.held_pool.rows = self.table.held_pool.rows[:4]
        pool = self.table.requests.token_pool
        pool.rows = pool.rows[:4]
        self.held: list[list[int]] = [[], [], []]
        self.unfinished: list[list[int]] = [[], [], []]

    def accept(self, rows: list[int], count: int) -> None:
        table = self.table
        runs = table.allocate(len(rows), Kind.RUN)
        asked = table.ask(runs, 7, runs.astype(np.uint64), 0.0, np.inf)
        table.requests.put_tokens(asked, np.full(len(rows), count), np.repeat(runs, count))
        table.count[runs] = count
        table.start[runs] = 10 * np.array([len(self.held[row]) + len(self.unfinished[row]) for row in rows])
        table.append(np.array(rows), runs)
        for row, run in zip(rows, runs.tolist(), strict=True):
            self.unfinished[row].append(run)

    def finish(self, rows: list[int], words: int) -> None:
        rows = [row for row in rows if self.unfinished[row]]
        runs = np.array([self.unfinished[row][0] for row in rows], np.int64)
        if words and rows:
            self.table.hold(runs, np.full(len(rows), words))
            for run in runs.tolist():
                self.table.held_answer(run)[:] = run
        self.table.finish(np.array(rows, np.int64), runs)
        for row in rows:
            self.held[row].append(self.unfinished[row].pop(0))

    def remove(self, row: int, places: set[int]) -> None:
        removed = [run for place, run in enumerate(self.unfinished[row]) if place in places]
        self.table.remove(row, removed)
        self.unfinished[row] = [run for run in self.unfinished[row] if run not in removed]

    def release(self, most: int) -> None:
        self.table.release_beyond(self.rows, most, 10**6)
        self.held = [held[max(0, len(held) - most) :] for held in self.held]

    def check(self) -> None:
        table, sessions = self.table, self.sessions
        for row in range(3):
            held, unfinished = self.held[row], self.unfinished[row]
            assert list(table.chain(row)) == held + unfinished
            assert list(table.unfinished(row)) == unfinished
            assert sessions.num_held[row] == len(held)
            assert sessions.num_unfinished[row] == len(unfinished)
            assert sessions.last_held[row] == (held[-1] if held else NO_RUN)
            assert sessions.last_run[row] == ([*held, *unfinished] or [NO_RUN])[-1]
            for run in held:
                assert table.status[run] == Status.HELD
                assert (table.held_answer(run) == run).all()
            for run in unfinished:
                requests, asked = table.requests, table.asked[run]
                first = requests.tokens[asked]
                assert (requests.token_pool.rows[first : first + table.count[run], 0] == run).all()
                assert table.request_of(run) == (7, run)
        lived = sum(map(len, self.held + self.unfinished))
        assert len(table) == lived
        asked = sorted(table.requests.run[table.requests.of_stream(7)].tolist())
        assert asked == sorted(run for runs in self.unfinished for run in runs)
        held_runs, places = table.held_runs(self.rows[::-1].copy())
        assert held_runs.tolist() == [run for row in (2, 1, 0) for run in self.held[row]]
        assert places.tolist() == [place for place, row in enumerate((2, 1, 0)) for _ in self.held[row]]


ROWS = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), ROWS, st.integers(1, 4)),
        st.tuples(st.just("finish"), ROWS, st.integers(0, 3)),
        st.tuples(st.just("remove"), st.integers(0, 2), st.sets(st.integers(0, 4))),
        st.tuples(st.just("release"), st.integers(0, 3), st.none()),
    ),
    max_size=40,
)


@QUICK
@given(STEPS)
def test_chains_hold_what_was_put_there_in_order(steps: list[tuple[str, object, object]]) -> None:
    chains = _Chains()
    for name, *arguments in steps:
        if name == "release":
            arguments.pop()
        getattr(chains, name)(*arguments)
        chains.check()
    chains.release(0)
    for row in range(3):
        chains.remove(row, set(range(100)))
    chains.check()
    assert chains.table.held_pool.num_live == chains.table.requests.token_pool.num_live == 0


def test_the_table_grows_and_keeps_its_runs() -> None:
    chains = _Chains()
    for _ in range(800):
        chains.accept([0, 1, 2], 2)
    chains.finish([1], 3)
    chains.check()


def test_acknowledging_lets_go_of_what_ends_at_or_before_the_position() -> None:
    chains = _Chains()
    for _ in range(3):
        chains.accept([0, 1], 5)
        chains.finish([0, 1], 2)
    chains.accept([0, 1], 5)
    chains.table.acknowledge(np.array([0, 1, 2]), np.array([15, 4, 99]))
    chains.held = [chains.held[0][2:], chains.held[1], []]
    chains.check()
    chains.table.acknowledge(np.array([0, 1]), np.array([99, 99]))
    chains.held = [[], [], []]
    chains.check()


def test_a_session_lets_go_of_its_oldest_answers_when_they_have_too_many_words() -> None:
    chains = _Chains()
    for words in (4, 3, 2):
        chains.accept([0], 1)
        chains.finish([0], words)
    chains.table.release_beyond(np.array([0]), 9, 5)
    chains.held[0] = chains.held[0][1:]
    chains.check()


def test_the_first_unfinished_run_can_be_taken_out_alone() -> None:
    chains = _Chains()
    for row in range(2):
        operation = chains.table.allocate(1, Kind.OPERATION)
        chains.table.append(np.array([row]), operation)
        chains.unfinished[row].append(int(operation[0]))
    chains.accept([1], 2)
    for row in range(2):
        chains.table.remove_first(row)
        del chains.unfinished[row][0]
    chains.check()


def test_a_finished_run_can_be_put_between_held_answers_and_unfinished_runs() -> None:
    chains = _Chains()
    chains.accept([0], 1)
    chains.finish([0], 1)
    for row in range(2):
        chains.table.append(np.array([row]), chains.table.allocate(1, Kind.GENERATE))
        chains.unfinished[row].append(int(chains.sessions.next_run[row]))
        for _ in range(2):
            runs = chains.table.allocate(1, Kind.GENERATE)
            chains.table.hold(runs, np.array([2]))
            chains.table.held_answer(int(runs[0]))[:] = runs
            chains.table.insert_held(np.array([row]), runs)
            chains.held[row].append(int(runs[0]))
    for row in range(2):
        held = chains.held[row]
        assert list(chains.table.chain(row)) == held + chains.unfinished[row]
        assert chains.sessions.last_held[row] == held[-1]
