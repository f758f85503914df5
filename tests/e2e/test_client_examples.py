"""The client's two examples work as they are written, and give what the model gives."""

import numpy as np

from cellserve import AsyncClient, Client
from tests.support.oracle import Oracle
from tests.support.server import ServerProcess


def test_the_blocking_example_works_as_written(server: ServerProcess) -> None:
    assert server.models is not None
    oracle = Oracle(server.models / "pycode" / "1")
    with Client(server.target) as client:
        assert "pycode" in [model.name for model in client.models()]
        with client.session("pycode") as session:
            result = session.step(b"import nump", top_k=3, logprobs=True)
            assert result.position == 11
            assert result.top_tokens is not None
            assert result.top_logprobs is not None
            assert result.logprobs is not None
            assert result.top_tokens.shape == result.top_logprobs.shape == (11, 3)
            trace = oracle.run(b"import nump")
            np.testing.assert_allclose(
                result.logprobs, trace.logprobs(np.frombuffer(b"import nump", np.uint8)), atol=1e-3
            )
            assert (np.diff(result.top_logprobs, axis=1) <= 0).all()
            branch = session.fork()
            state = session.export_state()
            text = bytes(branch.generate(max_tokens=40, temperature=0.7, seed=7))
            assert len(text) == 40
            assert (branch.position, session.position) == (51, 11)
        with client.session("pycode", state=state) as again:
            assert again.position == 11
            assert bytes(again.generate(max_tokens=40, temperature=0.7, seed=7)) == text


async def test_the_asynchronous_example_works_as_written(server: ServerProcess) -> None:
    async with AsyncClient(server.target) as client:
        async with client.session("pycode", id="editor-42") as session:
            result = await session.step([100, 101, 102])
            assert result.next_token is not None
            assert result.next_token.shape == (3,)
            tokens = []
            async for token in session.generate(max_tokens=5, temperature=0.0):
                tokens.append(token)
            assert tokens[0] == result.next_token[-1]
            assert (len(tokens), session.position) == (5, 8)
        async with client.session("pycode", id="editor-42", mode="attach", keep=False) as again:
            assert not again.created
            assert again.position == 8
