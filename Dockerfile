# The server's image: `make image`, or `docker build --tag cellserve .`
#
# PIP_ARGS goes to pip. Which build of torch the image holds depends on the package index alone: from an index that
# offers a CPU build (PIP_ARGS="--extra-index-url <PyTorch's index of CPU builds>"), pip takes that one; otherwise it is
# the index's default, on PyPI for Linux the CUDA build, which runs without a GPU too and is gigabytes larger.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG PIP_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /venv
WORKDIR /source
COPY constraints.txt ./
# A layer of its own: torch is nearly all of the image, and its pin changes rarely.
# hadolint ignore=SC2086
RUN /venv/bin/pip install ${PIP_ARGS} --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md ./
COPY client client
COPY service service
COPY model model
# hadolint ignore=SC2086
RUN /venv/bin/pip install ${PIP_ARGS} --constraint constraints.txt ".[server]"

FROM ${PYTHON_IMAGE}
# A named volume takes its owner from the folder that it is mounted on: so the user below can write a store there.
RUN useradd --uid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin cellserve \
    && install --directory --owner=cellserve --group=cellserve --mode=0700 /data
COPY --from=build /venv /venv
# On a GPU Triton builds the launcher of its kernels with a C compiler; a CPU build of torch brings no Triton.
# hadolint ignore=DL3008
RUN if ls -d /venv/lib/python3*/site-packages/triton >/dev/null 2>&1; then \
      apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
# Nothing is written but under /tmp, and under /data with a store there: the root file system can be read-only.
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CELLSERVE_LISTEN=0.0.0.0:50051 \
    CELLSERVE_METRICS_LISTEN=0.0.0.0:9464 \
    CELLSERVE_ALLOW_INSECURE=true
# Beyond loopback and without TLS inside the container: whoever runs it decides what is published, and to whom.
EXPOSE 50051 9464
USER 10001
WORKDIR /tmp
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-m", "cellserve_service.health_check"]
# In exec form, so that the server itself gets SIGTERM and drains.
ENTRYPOINT ["cellserve-server"]
