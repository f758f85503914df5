"""What every state store does, on both: several replicas on one database."""

import asyncio
from dataclasses import replace

import pytest

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.stores.operations import (
    Claim,
    ClaimAll,
    Claimed,
    ClaimMode,
    ClaimResult,
    End,
    Ended,
    Listed,
    ListRows,
    Load,
    Loaded,
    Operation,
    Outcome,
    Row,
    Save,
    StateStore,
    Written,
)
from tests.service.conftest import ENDED_MEMORY_SECONDS, OpenReplica

NOW = 1_700_000_000.125
LIVES_SECONDS = 3600.0
CLOSED, EXPIRED = ErrorReason.ERROR_REASON_SESSION_CLOSED, ErrorReason.ERROR_REASON_SESSION_EXPIRED
MINE, OTHERS, THIRD = 2**64 - 1, 2**63, 3
HOLDER = 2**64 - 2

SITUATIONS = ("missing", "ended", "expired", "mine", "others", "other model")
CREATES = [ClaimResult.CREATED] * 3
RESULTS = {
    ClaimMode.ATTACH: [ClaimResult.MISSING, ClaimResult.ENDED, ClaimResult.ENDED, ClaimResult.KEPT, ClaimResult.TAKEN],
    ClaimMode.CREATE: [*CREATES, ClaimResult.EXISTS, ClaimResult.EXISTS],
    ClaimMode.ATTACH_OR_CREATE: [*CREATES, ClaimResult.KEPT, ClaimResult.TAKEN],
    ClaimMode.RESUME: [ClaimResult.MISSING, ClaimResult.ENDED, ClaimResult.ENDED, ClaimResult.KEPT, ClaimResult.TAKEN],
}


def a_row(session_id: str = "s", *, epoch: int = 1, position: int = 0, model: str = "gru") -> Row:
    return Row(
        session_id=session_id,
        model=model,
        epoch=epoch,
        position=position,
        holder=HOLDER,
        expires_at=NOW + LIVES_SECONDS,
        request_id="opened",
        blob=f"state at {position}".encode(),
        checkpoints=b"marks",
    )


def attach(session_id: str = "s", *, epoch: int = 0, is_resident: bool = False) -> Claim:
    return Claim(session_id, "gru", ClaimMode.ATTACH, epoch=epoch, is_resident=is_resident)


def create(session_id: str = "s", mode: ClaimMode = ClaimMode.CREATE) -> Claim:
    return Claim(session_id, "gru", mode, created=a_row(session_id))


def close(session_id: str = "s", *, position: int = 9) -> End:
    return End(session_id, CLOSED, "closed", position, NOW + 100)


async def do(store: StateStore, operation: Operation, *, now: float = NOW) -> Outcome:
    (outcome,) = await store.apply([operation], now=now)
    return outcome


async def stored(store: StateStore, session_id: str = "s", *, now: float = NOW) -> Loaded:
    loaded = await do(store, Load(session_id), now=now)
    assert isinstance(loaded, Loaded)
    return loaded


@pytest.fixture
async def mine(open_replica: OpenReplica) -> StateStore:
    return await open_replica(MINE)


@pytest.fixture
async def others(open_replica: OpenReplica) -> StateStore:
    return await open_replica(OTHERS)


async def arrange(situation: str, mine: StateStore, others: StateStore) -> None:
    """Let there be the session, at epoch 5, as the situation says."""
    if situation == "missing":
        return
    row = a_row(epoch=5, position=9, model="lstm" if situation == "other model" else "gru")
    if situation == "expired":
        row = replace(row, expires_at=NOW)
    await do(mine if situation in ("mine", "ended") else others, Save(row))
    if situation == "ended":
        await do(mine, close())


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("mode", ClaimMode)
async def test_a_claim_comes_to_what_its_mode_and_the_session_say(
    mode: ClaimMode, situation: str, mine: StateStore, others: StateStore
) -> None:
    await arrange(situation, mine, others)
    before = await stored(mine)
    expected = dict(zip(SITUATIONS, [*RESULTS[mode], ClaimResult.EXISTS], strict=True))[situation]
    claim = Claim("s", "gru", mode, holder=HOLDER, created=a_row())
    claimed = await do(mine, claim)
    after = await stored(mine)
    row = a_row(epoch=5, position=9, model="lstm" if situation == "other model" else "gru")
    reason = {"ended": Ended(CLOSED, "closed", 9), "expired": Ended(EXPIRED, "", 9)}.get(situation)
    match expected:
        case ClaimResult.CREATED:
            epoch = 1 if situation == "missing" else 6
            assert (claimed, after) == (Claimed(expected, epoch), Loaded(a_row(), epoch))
        case ClaimResult.KEPT | ClaimResult.TAKEN:
            assert (claimed, after) == (Claimed(expected, 6, row), Loaded(row, 6))
        case ClaimResult.EXISTS:
            assert (claimed, after) == (Claimed(expected, 5, row), before)
        case _:
            assert (claimed, after) == (Claimed(expected, ended=reason), before)


@pytest.mark.parametrize("mode", [ClaimMode.CREATE, ClaimMode.ATTACH_OR_CREATE])
async def test_without_a_row_no_session_is_made(mode: ClaimMode, mine: StateStore) -> None:
    claim = Claim("s", "gru", mode)
    assert await do(mine, claim) == Claimed(ClaimResult.MISSING)
    await do(mine, close())
    assert await do(mine, claim) == Claimed(ClaimResult.ENDED, ended=Ended(CLOSED, "closed", 9))


@pytest.mark.parametrize("holder", [None, 0, HOLDER - 1, HOLDER & 0x7FFF_FFFF_FFFF_FFFF])
@pytest.mark.parametrize("situation", ["mine", "others"])
async def test_only_the_holder_resumes(
    holder: int | None, situation: str, mine: StateStore, others: StateStore
) -> None:
    await arrange(situation, mine, others)
    resume = Claim("s", "gru", ClaimMode.RESUME, holder=holder)
    assert await do(mine, resume) == Claimed(ClaimResult.MOVED, 5)
    assert await stored(mine) == Loaded(a_row(epoch=5, position=9), 5)


async def test_an_attach_gives_the_session_to_another_holder(mine: StateStore) -> None:
    await do(mine, create())
    claimed = await do(mine, replace(attach(), holder=77))
    assert claimed == Claimed(ClaimResult.KEPT, 2, replace(a_row(), holder=77))
    assert await do(mine, Claim("s", None, ClaimMode.RESUME, holder=77)) == replace(claimed, epoch=3)


async def test_a_claim_of_any_model_takes_any(mine: StateStore) -> None:
    await do(mine, Save(a_row(model="lstm")))
    claimed = await do(mine, Claim("s", None, ClaimMode.ATTACH))
    assert claimed == Claimed(ClaimResult.KEPT, 2, a_row(model="lstm"))


@pytest.mark.parametrize(("stored_epoch", "given", "expected"), [(5, 0, 6), (5, 5, 6), (5, 6, 6), (5, 9, 9)])
async def test_a_claim_raises_the_epoch_above_the_stored_one_and_to_the_given_one(
    stored_epoch: int, given: int, expected: int, mine: StateStore, others: StateStore
) -> None:
    for store in (mine, others):
        await do(mine, Save(a_row(epoch=stored_epoch)))
        claimed = await do(store, attach(epoch=given))
        assert isinstance(claimed, Claimed)
        assert claimed.epoch == expected
        assert claimed.row == a_row(epoch=stored_epoch)
        await do(store, replace(close(), forget_at=NOW))


async def test_a_resident_session_is_read_only_if_another_replica_has_it(mine: StateStore, others: StateStore) -> None:
    await do(mine, create())
    assert await do(mine, attach(is_resident=True)) == Claimed(ClaimResult.KEPT, 2)
    assert await do(others, attach(is_resident=True)) == Claimed(ClaimResult.TAKEN, 3, a_row())


async def test_whoever_lost_a_session_can_neither_write_nor_end_it(mine: StateStore, others: StateStore) -> None:
    await do(mine, create())
    await do(others, attach())
    later = a_row(epoch=9, position=9)
    assert await mine.apply([Save(later), close()], now=NOW) == [Written.FENCED, Written.FENCED]
    assert await stored(mine) == Loaded(a_row(), 2)
    assert await do(others, Save(a_row(epoch=2, position=3))) == Written.WRITTEN


@pytest.mark.parametrize(("epoch", "position"), [(4, 99), (5, 8)])
async def test_a_save_replaces_nothing_newer(epoch: int, position: int, mine: StateStore) -> None:
    newest = a_row(epoch=5, position=9)
    await do(mine, Save(newest))
    assert await do(mine, Save(a_row(epoch=epoch, position=position))) == Written.OLDER
    assert await stored(mine) == Loaded(newest, 5)


@pytest.mark.parametrize(("epoch", "position"), [(5, 9), (5, 10), (6, 0)])
async def test_a_save_replaces_what_is_not_newer(epoch: int, position: int, mine: StateStore) -> None:
    await do(mine, Save(a_row(epoch=5, position=9)))
    newest = replace(a_row(epoch=epoch, position=position), holder=0, request_id="", expires_at=NOW + 0.1)
    assert await do(mine, Save(newest)) == Written.WRITTEN
    assert await stored(mine) == Loaded(newest, epoch)


async def test_a_save_of_a_session_that_is_not_there_makes_it(mine: StateStore) -> None:
    assert await do(mine, Save(a_row(epoch=4, position=2))) == Written.WRITTEN
    assert await stored(mine) == Loaded(a_row(epoch=4, position=2), 4)


async def test_a_save_leaves_the_session_s_epoch_where_a_claim_raised_it(mine: StateStore) -> None:
    await do(mine, create())
    await do(mine, attach(epoch=8))
    await do(mine, Save(a_row(epoch=3, position=5)))
    assert await stored(mine) == Loaded(a_row(epoch=3, position=5), 8)


async def test_checkpoints_stay_until_others_are_given(mine: StateStore) -> None:
    async def save(checkpoints: bytes | None) -> bytes | None:
        await do(mine, Save(replace(a_row(), checkpoints=checkpoints)))
        row = (await stored(mine)).row
        assert row is not None
        return row.checkpoints

    assert [await save(marks) for marks in (None, b"one", None, b"two", b"", None)] == [
        *(None, b"one", b"one", b"two", None, None)
    ]


async def test_an_ended_session_is_remembered_until_its_time(mine: StateStore, others: StateStore) -> None:
    await do(mine, create())
    assert await do(mine, close()) == Written.WRITTEN
    ended = Ended(CLOSED, "closed", 9)
    assert await stored(others, now=NOW + 99) == Loaded(ended=ended)
    assert await do(mine, Save(a_row()), now=NOW + 99) == Written.FENCED
    assert await stored(others, now=NOW + 100) == Loaded()
    assert await do(others, attach(), now=NOW + 100) == Claimed(ClaimResult.MISSING)


async def test_a_session_that_is_not_there_can_be_ended(mine: StateStore) -> None:
    assert await do(mine, close()) == Written.WRITTEN
    assert await stored(mine) == Loaded(ended=Ended(CLOSED, "closed", 9))


async def test_a_row_whose_time_is_over_has_ended_and_is_forgotten_later(mine: StateStore, others: StateStore) -> None:
    await do(mine, create())
    over = NOW + LIVES_SECONDS
    ended = Ended(EXPIRED, "", 0)
    assert await stored(mine, now=over - 1) == Loaded(a_row(), 1)
    assert await stored(mine, now=over) == Loaded(ended=ended)
    assert await do(mine, attach(), now=over) == Claimed(ClaimResult.ENDED, ended=ended)
    assert await do(others, ListRows("", "", 5), now=over) == Listed([], 0)
    assert await stored(mine, now=over + ENDED_MEMORY_SECONDS - 1) == Loaded(ended=ended)
    assert await stored(mine, now=over + ENDED_MEMORY_SECONDS) == Loaded()


async def test_its_owner_brings_back_a_row_whose_time_is_over(mine: StateStore, others: StateStore) -> None:
    await do(mine, create())
    over = NOW + LIVES_SECONDS
    again = replace(a_row(position=1), expires_at=over + 5)
    assert await do(others, Save(again), now=over) == Written.FENCED
    assert await do(mine, Save(again), now=over) == Written.WRITTEN
    assert await stored(others, now=over) == Loaded(again, 1)


@pytest.mark.parametrize("model", ["", "gru", "lstm", "none"])
async def test_pages_hold_every_living_session_once_in_order(model: str, mine: StateStore, others: StateStore) -> None:
    rows = [a_row(name, model=of) for name, of in zip("acBDeFghZz", ["gru", "lstm"] * 5, strict=True)]
    await mine.apply([Save(row) for row in rows[:5]], now=NOW)
    await others.apply([Save(row) for row in rows[5:]], now=NOW)
    await mine.apply([Save(replace(a_row("f"), expires_at=NOW)), Save(a_row("q")), close("q")], now=NOW)
    expected = sorted((row for row in rows if model in ("", row.model)), key=lambda row: row.session_id)
    listed: list[tuple[Row, int]] = []
    while True:
        page = await do(mine, ListRows(model, listed[-1][0].session_id if listed else "", 3))
        assert isinstance(page, Listed)
        assert page.total == len(expected)
        listed += page.rows
        if len(page.rows) < 3:
            break
    assert listed == [(row, 1) for row in expected]


async def test_sessions_that_end_and_come_again_with_another_model_are_counted_there(mine: StateStore) -> None:
    await mine.apply([create(), close(), Claim("s", None, ClaimMode.CREATE, created=a_row(model="lstm"))], now=NOW)
    assert await do(mine, ListRows("gru", "", 5)) == Listed([], 0)
    assert await do(mine, ListRows("lstm", "", 5)) == Listed([(a_row(model="lstm"), 2)], 1)


async def test_claims_of_a_group_all_succeed(mine: StateStore, others: StateStore) -> None:
    await others.apply([create("b"), create("c")], now=NOW)
    assert await do(mine, ClaimAll([create("a"), attach("b"), attach("c", epoch=7)])) == [
        Claimed(ClaimResult.CREATED, 1),
        Claimed(ClaimResult.TAKEN, 2, a_row("b")),
        Claimed(ClaimResult.TAKEN, 7, a_row("c")),
    ]
    assert await do(others, Save(a_row("b", epoch=9))) == Written.FENCED


async def test_where_one_claim_of_a_group_is_refused_nothing_has_happened(mine: StateStore, others: StateStore) -> None:
    await others.apply([create("b"), create("c")], now=NOW)
    assert await do(mine, ClaimAll([create("a"), attach("b"), create("c"), attach("d")])) == [
        Claimed(ClaimResult.UNDONE),
        Claimed(ClaimResult.UNDONE),
        Claimed(ClaimResult.EXISTS, 1, a_row("c")),
        Claimed(ClaimResult.MISSING),
    ]
    assert await stored(mine, "a") == Loaded()
    assert await do(others, Save(a_row("b", epoch=9))) == Written.WRITTEN


async def test_a_batch_sees_what_it_did_before(mine: StateStore) -> None:
    later = replace(a_row(position=1), checkpoints=None)
    batch: list[Operation] = [
        Load("s"),
        create(),
        Load("s"),
        Save(later),
        Load("s"),
        ListRows("", "", 1),
        close(),
        Load("s"),
    ]
    saved = replace(later, checkpoints=b"marks")
    assert await mine.apply(batch, now=NOW) == [
        Loaded(),
        Claimed(ClaimResult.CREATED, 1),
        Loaded(a_row(), 1),
        Written.WRITTEN,
        Loaded(saved, 1),
        Listed([(saved, 1)], 1),
        Written.WRITTEN,
        Loaded(ended=Ended(CLOSED, "closed", 9)),
    ]


async def test_an_empty_batch_is_nothing(mine: StateStore) -> None:
    assert await mine.apply([], now=NOW) == []


@pytest.mark.parametrize("mode", [ClaimMode.CREATE, ClaimMode.ATTACH_OR_CREATE])
async def test_a_creation_that_is_repeated_has_created(mode: ClaimMode, mine: StateStore, others: StateStore) -> None:
    batch: list[Operation] = [create("a", mode), ClaimAll([create("b", mode), create("c", mode)])]
    outcomes = await mine.apply(batch, now=NOW)
    assert await mine.apply(batch, now=NOW) == outcomes
    assert outcomes == [Claimed(ClaimResult.CREATED, 1), [Claimed(ClaimResult.CREATED, 1)] * 2]
    assert await do(mine, create("a")) == Claimed(ClaimResult.EXISTS, 1, a_row("a"))
    await do(others, attach("a"))
    assert await do(mine, batch[0]) != outcomes[0]


async def test_a_takeover_that_is_repeated_keeps_the_session(mine: StateStore, others: StateStore) -> None:
    await do(others, create())
    resume = Claim("s", "gru", ClaimMode.RESUME, holder=HOLDER)
    assert await do(mine, resume) == Claimed(ClaimResult.TAKEN, 2, a_row())
    assert await do(mine, resume) == Claimed(ClaimResult.KEPT, 3, a_row())


async def test_saves_and_ends_that_are_repeated_come_to_the_same(mine: StateStore) -> None:
    await mine.apply([create("a"), create("b")], now=NOW)
    batch: list[Operation] = [Save(a_row("a", position=4)), close("b")]
    for _ in range(3):
        assert await mine.apply(batch, now=NOW) == [Written.WRITTEN, Written.WRITTEN]
    assert await do(mine, close("b", position=1)) == Written.FENCED  # another end


async def test_of_replicas_that_claim_a_session_again_and_again_one_owns_it(open_replica: OpenReplica) -> None:
    """A claim meets the state of every earlier one whose save counted, unless its own replica held it all along."""
    stores = [await open_replica(mark) for mark in (MINE, OTHERS, THIRD)]
    await do(stores[0], create())
    claims: list[tuple[int, int, int]] = []  # epoch, replica's place, epoch of the state it met
    saves: list[tuple[int, int]] = []  # epoch, replica's place

    async def compete(place: int) -> None:
        for _ in range(40):
            claimed = await do(stores[place], attach())
            assert isinstance(claimed, Claimed)
            assert claimed.row is not None
            claims.append((claimed.epoch, place, claimed.row.epoch))
            if await do(stores[place], Save(a_row(epoch=claimed.epoch))) is Written.WRITTEN:
                saves.append((claimed.epoch, place))

    await asyncio.gather(*(compete(place) for place in range(3)))
    assert sorted(epoch for epoch, _, _ in claims) == list(range(2, 122))
    assert len({place for _, place in saves}) == 3
    for epoch, place, met in claims:
        assert all(saved <= met for saved, by in saves if saved < epoch and by != place)
    last, owner, _ = max(claims)
    late = [await do(store, Save(a_row(epoch=last, position=1))) for store in stores]
    assert [place for place, outcome in enumerate(late) if outcome is Written.WRITTEN] == [owner]


async def test_blobs_of_any_size_and_content_come_back(mine: StateStore) -> None:
    rows = [replace(a_row(str(size)), blob=bytes(range(256)) * size) for size in (0, 1, 16, 4096)]
    await mine.apply([Save(row) for row in rows], now=NOW)
    assert [(await stored(mine, row.session_id)).row for row in rows] == rows


async def test_what_one_store_wrote_is_there_when_it_is_closed_and_opened(open_replica: OpenReplica) -> None:
    first = await open_replica(MINE)
    await first.apply([Save(a_row(str(number))) for number in range(700)], now=NOW)
    await first.close()
    listed = await do(await open_replica(OTHERS), ListRows("", "", 1000))
    assert isinstance(listed, Listed)
    assert sorted(int(row.session_id) for row, _ in listed.rows) == list(range(700))
