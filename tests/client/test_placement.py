"""Which replica a session prefers: the same everywhere, spread evenly, and few sessions move."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from cellserve._placement import preferred

TARGETS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=8, unique=True)
SESSIONS = [f"session-{number}" for number in range(40)]


def test_the_answer_is_the_same_in_every_process() -> None:
    answers = [preferred(name, ["a:1", "b:1", "c:1"])[0] for name in SESSIONS[:8]]
    assert "".join(answers) == "bbcbcaaa"


@given(TARGETS, st.randoms())
def test_the_order_of_the_replicas_does_not_matter(targets: list[str], random: Random) -> None:
    shuffled = random.sample(targets, len(targets))
    assert [preferred(name, targets) for name in SESSIONS] == [preferred(name, shuffled) for name in SESSIONS]


@given(TARGETS, st.data())
def test_where_a_replica_goes_only_its_own_sessions_move(targets: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(targets))
    rest = [target for target in targets if target != gone]
    if not rest:
        return
    for name in SESSIONS:
        before = preferred(name, targets)
        if before != gone:
            assert preferred(name, rest) == before


@given(TARGETS, st.text(st.characters(codec="utf-8"), min_size=1))
def test_where_a_replica_comes_sessions_move_to_it_alone(targets: list[str], new: str) -> None:
    for name in SESSIONS:
        before, after = preferred(name, targets), preferred(name, [*targets, new])
        assert after in (before, new)


def test_sessions_are_spread_evenly() -> None:
    counts = Counter(preferred(f"session-{number}", ["a:1", "b:1", "c:1", "d:1"]) for number in range(4000))
    assert len(counts) == 4
    assert all(850 < count < 1150 for count in counts.values())
