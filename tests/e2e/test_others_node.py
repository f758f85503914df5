"""A Node client made of others' libraries streams, and hears what the oracle says."""

import json
import subprocess
from typing import Any

import numpy as np
import pytest

from cellserve.v1.errors_pb2 import ErrorReason
from tests.support.programs import ROOT, refuse, require_program
from tests.support.wire import Wire

NODE = ROOT / "tests" / "node"
RUNS = [[[1, 2, 3], [4], [5, 6] * 40], [[10], [9, 8, 7], [1] * 50]]


@pytest.fixture
def heard(wire: Wire) -> dict[str, Any]:
    """Everything that the Node client heard, from the first frame to the status."""
    node = require_program("node")
    for package in ("@grpc/grpc-js", "@grpc/proto-loader"):
        if not (NODE / "node_modules" / package).is_dir():
            refuse(f"the npm package {package} is not installed in tests/node (make system-deps)")
    done = subprocess.run(
        [node, NODE / "stream.mjs", wire.server.target, "tiny-gru", json.dumps(RUNS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_node_client_streams_two_sessions(wire: Wire, heard: dict[str, Any]) -> None:
    assert heard["status"] == 0
    assert [one["request"] for one in heard["opened"]] == [1, 2]
    assert all(one["created"] for one in heard["opened"])
    assert sum(heard["done"]) == 2
    [failure] = heard["failures"]
    assert failure["reasons"] == [ErrorReason.Name(ErrorReason.ERROR_REASON_INVALID_INPUT)]
    found = rows_by_request(heard["answers"])
    assert len(found) == 6
    for place, runs in enumerate(RUNS):
        trace = wire.oracle("tiny-gru").run([token for run in runs for token in run])
        first = 0
        for turn, run in enumerate(runs):
            rows = found[3 + 2 * turn + place]
            end = first + len(run)
            assert [row["position"] for row in rows][-1] == end
            states = np.concatenate([row["states"] for row in rows])
            np.testing.assert_allclose(states, trace.states[first:end], rtol=0, atol=2e-5)
            logits = trace.logits[first + 1 : end + 1]
            expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            best = -np.sort(-expected, axis=1)[:, :2]
            logprobs = np.concatenate([row["top_logprobs"] for row in rows])
            np.testing.assert_allclose(logprobs, best, rtol=0, atol=2e-4)
            top_tokens = np.concatenate([row["top_tokens"] for row in rows])
            assert [token for row in rows for token in row["next_tokens"]] == top_tokens[:, 0].tolist()
            first = end


def rows_by_request(answers: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The slices of every request, in order, with their own outputs."""
    found: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        shape = tuple(answer["shape"])
        states = np.array(answer["states"]).reshape(shape)
        top_logprobs = np.array(answer["top_logprobs"]).reshape(shape[0], 2)
        top_tokens = np.array(answer["top_tokens"]).reshape(shape[0], 2)
        counts = answer["counts"] or [1] * len(answer["requests"])
        assert sum(counts) == shape[0]
        first = 0
        for row, (request, count) in enumerate(zip(answer["requests"], counts, strict=True)):
            own = slice(first, first + count)
            found.setdefault(request, []).append(
                {
                    "position": answer["positions"][row],
                    "states": states[own],
                    "next_tokens": answer["next_tokens"][own],
                    "top_tokens": top_tokens[own],
                    "top_logprobs": top_logprobs[own],
                }
            )
            first += count
    return found
