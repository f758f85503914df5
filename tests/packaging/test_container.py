"""The image as the Dockerfile builds it, and the compose file as it stands, in a real container engine."""

import json
import os
import sys
import time
from collections.abc import Iterator

import pytest

from tests.packaging.private_docker import PrivateDocker, private_docker, wheels_for_the_image
from tests.support.programs import ROOT, require_program

pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(900),  # the first test builds the image
    pytest.mark.skipif(
        "true" not in (os.environ.get("CI"), os.environ.get("CELLSERVE_TEST_CONTAINER")),
        reason="builds the image, for some minutes and as root: make test-container",
    ),
]

# No package registry has these images: Debian's Prometheus under the same name, and a web server as Grafana.
PROMETHEUS_STAND_IN = """
FROM python:3.11-slim
COPY prometheus promtool /bin/
RUN mkdir /prometheus && chown 65534:65534 /prometheus
USER 65534
ENTRYPOINT ["/bin/prometheus"]
"""
GRAFANA_STAND_IN = """
FROM python:3.11-slim
USER 65534
STOPSIGNAL SIGKILL
ENTRYPOINT ["python3", "-m", "http.server", "3000", "--directory", "/dashboards"]
"""

STEP = """
import sys
from cellserve import Client
with Client(sys.argv[1]) as client, client.session("pycode") as session:
    print(session.step(b"import nump").position)
"""
STEP_AND_HOLD = """
import sys
from cellserve import Client
with Client(sys.argv[1]) as client:
    session = client.open_session("pycode", id="held")
    print(session.step(b"import nump").position, flush=True)
    sys.stdin.read()
"""
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDocker]:
    """A daemon of its own that holds the image `cellserve` and the stand-ins."""
    programs = [require_program("prometheus"), require_program("promtool")]
    with private_docker() as docker:
        with wheels_for_the_image(docker) as pip_arguments:
            docker.docker("build", "--build-arg", f"PIP_ARGS={pip_arguments}", "--tag", "cellserve", ".")
        services = json.loads(docker.compose("config", "--format", "json"))["services"]
        stand_ins = [("prometheus", PROMETHEUS_STAND_IN, programs), ("grafana", GRAFANA_STAND_IN, [])]
        for name, dockerfile, files in stand_ins:
            context = tmp_path_factory.mktemp(name)
            (context / "Dockerfile").write_text(dockerfile)
            for file in files:
                (context / file.name).write_bytes(file.read_bytes())
                (context / file.name).chmod(0o755)
            docker.docker("build", "--tag", services[name]["image"], str(context))
        yield docker


@pytest.fixture(scope="module")
def composed(docker: PrivateDocker) -> Iterator[PrivateDocker]:
    """All that `docker compose up` starts, up and healthy."""
    docker.compose("up", "--detach", "--no-build", "--pull", "never", "--wait", "--wait-timeout", "120")
    yield docker
    print(docker.compose("logs", "server"))
    docker.compose("down", "--volumes")


def fetch(docker: PrivateDocker, url: str) -> str:
    return docker.inside(sys.executable, "-c", FETCH, url)


def inspected(docker: PrivateDocker, container: str, place: str) -> str:
    return docker.docker("inspect", "--format", f"{{{{{place}}}}}", container).strip()


def test_the_server_becomes_healthy(composed: PrivateDocker) -> None:
    assert inspected(composed, "cellserve-server-1", ".State.Health.Status") == "healthy"


def test_the_server_is_not_root_and_cannot_write_to_its_root_file_system(composed: PrivateDocker) -> None:
    assert composed.compose("exec", "--no-TTY", "server", "id", "--user").strip() == "10001"
    script = "touch /probe 2> /tmp/said; cat /tmp/said"
    assert "Read-only file system" in composed.compose("exec", "--no-TTY", "server", "sh", "-c", script)


def test_the_server_keeps_its_sessions_in_the_volume(composed: PrivateDocker) -> None:
    files = composed.compose("exec", "--no-TTY", "server", "stat", "--format=%n %u", "/data/sessions.db")
    assert files.strip() == "/data/sessions.db 10001"


def test_a_client_outside_the_container_steps_a_session(composed: PrivateDocker) -> None:
    assert composed.inside(sys.executable, "-c", STEP, "127.0.0.1:50051").strip() == "11"


def test_prometheus_finds_and_scrapes_the_server(composed: PrivateDocker) -> None:
    url = "http://127.0.0.1:9090/api/v1/query?query=up%7Bjob%3D%22cellserve%22%7D"
    deadline = time.monotonic() + 60
    while True:
        result = json.loads(fetch(composed, url))["data"]["result"]
        if [sample["value"][1] for sample in result] == ["1"]:
            return
        assert time.monotonic() < deadline, result
        time.sleep(1)


def test_grafana_is_given_the_dashboard(composed: PrivateDocker) -> None:
    committed = (ROOT / "deploy" / "grafana" / "dashboards" / "cellserve.json").read_text()
    assert fetch(composed, "http://127.0.0.1:3000/cellserve.json").strip() == committed.strip()


def test_sigterm_drains_the_server(docker: PrivateDocker) -> None:
    options = [
        "--read-only",
        "--tmpfs=/tmp",
        "--cap-drop=ALL",
        "--health-interval=1s",
        "--publish=127.0.0.1:50151:50051",
    ]
    docker.docker("run", "--detach", "--name", "drained", *options, "cellserve")
    deadline = time.monotonic() + 60
    while inspected(docker, "drained", ".State.Health.Status") != "healthy":
        assert time.monotonic() < deadline, docker.docker("logs", "drained")
        time.sleep(0.5)

    with docker.running_inside(sys.executable, "-c", STEP_AND_HOLD, "127.0.0.1:50151") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"11\n"
        started = time.monotonic()
        docker.docker("stop", "--time", "60", "drained")
        assert time.monotonic() - started < 40
    # 143 and 137: SIGTERM or SIGKILL ended it before it had finished.
    assert inspected(docker, "drained", ".State.ExitCode") == "0", docker.docker("logs", "drained")
