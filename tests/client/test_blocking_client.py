"""The blocking classes are the asynchronous ones in signature and documentation, over one shared loop."""

import asyncio
import inspect
import threading
from importlib.resources import files

import pytest

from cellserve import (
    AsyncClient,
    AsyncGeneration,
    AsyncSession,
    Client,
    Generation,
    Session,
)
from cellserve._portal import Portal
from cellserve.errors import ClosedError

PAIRS = [(AsyncClient, Client), (AsyncSession, Session), (AsyncGeneration, Generation)]


def public_members(kind: type) -> dict[str, object]:
    return {
        name: member
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") and name != "aclose"  # which `async` asks for by this name
    }


@pytest.mark.parametrize(("asynchronous", "blocking"), PAIRS)
def test_every_public_member_has_its_blocking_namesake(asynchronous: type, blocking: type) -> None:
    assert set(public_members(asynchronous)) <= set(public_members(blocking))


@pytest.mark.parametrize(("asynchronous", "blocking"), PAIRS)
def test_namesakes_have_the_same_arguments_and_documentation(asynchronous: type, blocking: type) -> None:
    for name, member in public_members(asynchronous).items():
        if not callable(member):
            continue
        ours, theirs = getattr(blocking, name), member
        assert list(inspect.signature(ours).parameters.values()) == list(
            inspect.signature(theirs).parameters.values()
        ), name
        assert inspect.getdoc(ours), name


def test_the_package_says_that_it_is_typed() -> None:
    assert files("cellserve").joinpath("py.typed").is_file()


async def thread_name() -> str:
    return threading.current_thread().name


def test_all_portals_share_one_loop_that_ends_with_the_last() -> None:
    one, two = Portal(), Portal()
    assert one.run(thread_name()) == two.run(thread_name()) == "cellserve-client"
    one.close()
    one.close()
    assert two.run(thread_name()) == "cellserve-client"
    two.close()
    assert "cellserve-client" not in {thread.name for thread in threading.enumerate()}


def test_a_portal_that_is_closed_says_so() -> None:
    portal = Portal()
    portal.close()
    with pytest.raises(ClosedError, match="closed"):
        portal.run(thread_name())


def test_what_a_coroutine_raises_is_raised_to_its_caller() -> None:
    async def fail() -> None:
        raise ZeroDivisionError("on the loop")

    portal = Portal()
    with pytest.raises(ZeroDivisionError, match="on the loop"):
        portal.run(fail())
    portal.close()


def test_calls_of_other_threads_go_on_while_one_waits() -> None:
    portal = Portal()
    event = portal.run(make_event())
    waiting = threading.Thread(target=lambda: portal.run(wait(event)))
    waiting.start()
    portal.run(set_event(event))
    waiting.join(10)
    assert not waiting.is_alive()
    portal.close()


async def make_event() -> asyncio.Event:
    return asyncio.Event()


async def wait(event: asyncio.Event) -> None:
    await event.wait()


async def set_event(event: asyncio.Event) -> None:
    event.set()


def test_a_client_that_was_never_used_closes_without_a_server() -> None:
    with Client("127.0.0.1:1"):
        pass


async def test_a_client_that_was_closed_says_so() -> None:
    client = AsyncClient("127.0.0.1:1")
    await client.close()
    await client.close()
    with pytest.raises(ClosedError):
        await client.models()
    with pytest.raises(ClosedError):
        await client.open_session("pycode")


@pytest.mark.parametrize("timeout_seconds", [0, -1, float("nan"), float("inf")])
def test_a_timeout_is_a_positive_number_of_seconds(timeout_seconds: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        AsyncClient("127.0.0.1:1", timeout_seconds=timeout_seconds)
