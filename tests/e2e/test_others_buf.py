"""`buf curl` calls the server through reflection, with no proto file at hand."""

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from tests.support.programs import require_program
from tests.support.wire import Wire


class BufCurl:
    """buf curl against one server; runs in an empty folder, so that it finds no proto file."""

    def __init__(self, folder: Path, target: str) -> None:
        self._buf = require_program("buf")
        self._folder = folder
        self._target = target

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HOME": str(self._folder)}
        command: list[str | Path] = [self._buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc", *arguments]
        return subprocess.run(
            command, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def call(self, method: str, **request: Any) -> dict[str, Any]:
        """A unary call."""
        done = self.run("--data", json.dumps(request), f"http://{self._target}/{method}")
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout or "{}")
        return answer

    def refused(self, method: str, **request: Any) -> dict[str, Any]:
        """The error of a call, as buf prints it."""
        done = self.run("--data", json.dumps(request), f"http://{self._target}/{method}")
        assert done.returncode != 0, done.stdout
        error: dict[str, Any] = json.loads(done.stderr)
        return error


@pytest.fixture
def buf(wire: Wire, tmp_path: Path) -> BufCurl:
    return BufCurl(tmp_path, wire.server.target)


def test_methods_are_listed_through_reflection(wire: Wire, buf: BufCurl) -> None:
    done = buf.run("--list-methods", f"http://{wire.server.target}")
    assert done.returncode == 0, done.stderr
    for method in (
        "cellserve.v1.SessionService/Stream",
        "cellserve.v1.SessionService/Step",
        "cellserve.v1.ModelService/ListModels",
        "grpc.health.v1.Health/Check",
    ):
        assert method in done.stdout


def test_models_are_listed(buf: BufCurl) -> None:
    models = {model["name"]: model for model in buf.call("cellserve.v1.ModelService/ListModels")["models"]}
    assert models["tiny-gru"]["gateNames"] == ["update", "reset"]
    assert models["tiny-gru"]["tokens"] == {"vocabSize": 11}
    assert models["vectors-lstm"]["vectors"] == {"inputSize": 3}


def test_a_session_is_opened_stepped_and_closed(wire: Wire, buf: BufCurl) -> None:
    service = "cellserve.v1.SessionService"
    opened = buf.call(f"{service}/OpenSessions", model="tiny-gru", session_ids=["by-buf"])
    assert opened["sessionIds"] == ["by-buf"]
    answer = buf.call(
        f"{service}/Step",
        session_id="by-buf",
        tokens={"ids": [1, 2, 3]},
        outputs={"at": "OUTPUT_AT_LAST", "next_token": True},
    )
    assert int(answer["position"]) == 3
    trace = wire.oracle("tiny-gru").run([1, 2, 3])
    assert answer["outputs"]["nextTokens"] == [int(np.argmax(trace.logits[-1]))]
    error = buf.refused(f"{service}/Step", session_id="by-buf", tokens={"ids": [99]})
    assert error["code"] == "invalid_argument"
    details = {detail["type"]: base64.b64decode(detail["value"] + "==") for detail in error["details"]}
    assert ErrorInfo.FromString(details["google.rpc.ErrorInfo"]).reason == "INVALID_INPUT"
    [violation] = BadRequest.FromString(details["google.rpc.BadRequest"]).field_violations
    assert violation.field == "tokens"
    assert int(buf.call(f"{service}/CloseSession", session_id="by-buf")["position"]) == 3


def test_health_is_asked(buf: BufCurl) -> None:
    assert buf.call("grpc.health.v1.Health/Check", service="cellserve.v1.SessionService")["status"] == "SERVING"
