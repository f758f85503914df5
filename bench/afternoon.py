"""E3: beside a server that steps one nn.GRUCell for each stream, a thread and a message a token."""

from __future__ import annotations

from typing import Final

import numpy as np
from google.protobuf.wrappers_pb2 import UInt32Value

from bench.loops import num_steps_for, single_steps, timed
from bench.methods import NAIVE_FOLLOW
from bench.processes import naive_server
from bench.raw import Exchanger, measure
from bench.rows import Goal, Row
from bench.running import Bench, check_against, check_next_tokens, tokens_for
from cellserve import AsyncClient

__all__ = ["afternoon"]

_CELL: Final = "gru_reset_after"
_NUM_TOKENS: Final = 64


async def afternoon(bench: Bench) -> None:
    """E3: tokens a second and p99 of 256 sessions."""
    hidden_size, number = (128, 64) if bench.effort.is_quick else (512, 256)
    model = bench.model(hidden_size, _CELL)
    size = {"H": hidden_size, "sessions": number}
    beside = "a stream, a thread and nn.GRUCell for each"
    tokens = tokens_for(_NUM_TOKENS, number)
    messages = [[UInt32Value(value=token).SerializeToString() for token in column] for column in tokens.T.tolist()]
    with naive_server(model) as naive, bench.server() as server:
        async with (
            AsyncClient(server.target) as client,
            Exchanger(naive.target, NAIVE_FOLLOW, number) as exchanger,
        ):
            checked = await check_next_tokens(bench, client, hidden_size, _CELL)
            best, leads = await bench.reference.call("most_likely_tokens", model, tokens, _CELL)
            found = [
                [UInt32Value.FromString(answer).value for (answer,) in await exchanger.ask(frame)]
                for frame in zip(*messages, strict=True)
            ]
            check_against(np.array(found), best, leads, "the naive server")
            rate = Row("E3", "coroutines, a token a call", size, "tokens/s", beside, Goal(">=", 10), checked)
            latency = Row("E3", "the same, p99", size, "ms", beside, Goal("<=", 0.2), checked)
            sessions = await client.open_sessions(model.parent.name, number)
            loop = single_steps(sessions, tokens)
            num_steps = await num_steps_for(loop, sessions, bench.effort.seconds, server.pid)
            bench.tell(f"E3: {rate.name}, beside {beside}")
            for _ in range(bench.effort.turns):
                theirs = await measure(exchanger, messages, bench.effort.seconds, naive.pid)
                ours = await timed(loop, sessions, num_steps, server.pid)
                rate.add(ours.tokens_per_second, theirs.tokens_per_second, **ours.details)
                latency.add(1000 * ours.p99_seconds, 1000 * theirs.p99_seconds)
            bench.add(rate)
            bench.add(latency)
