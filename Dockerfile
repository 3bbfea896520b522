# Image of the anyres command. Final stages: runtime (the default) and test (runs the tests).
#   docker build -t anyres .                                            for NVIDIA GPUs
#   docker build -t anyres:cpu --build-arg TORCH=cpu .                  for CPUs
#   docker build -t anyres:test --build-arg TORCH=cpu --target test . && docker run --rm anyres:test
# Python packages are locked with hashes (tools/lock renews them). To lock system packages as well, pin the base by digest.
ARG TORCH=cuda
ARG CUDA_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG CPU_BASE=debian:bookworm-slim

FROM ${CUDA_BASE} AS base-cuda
FROM ${CPU_BASE} AS base-cpu

# hadolint ignore=DL3006
FROM base-${TORCH} AS python
# Python 3.11 or later; the distribution of the base determines its version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /cache --create-home --shell /usr/sbin/nologin anyres \
    && chmod 1777 /cache
# Everything that libraries write outside the folder of the run goes to /cache (models from the hub, compiled planners,
# fonts). It is writable for any user id, and the only other mount that a read-only image needs.
ENV HOME=/cache XDG_CACHE_HOME=/cache PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /workspace

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.8 && /opt/uv/bin/uv venv /opt/venv
ENV VIRTUAL_ENV=/opt/venv UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_CACHE_DIR=/root/.cache/uv
COPY requirements.lock requirements-test.lock /locks/
ARG TORCH
# PyTorch's CPU builds of the same versions are on its own index. Their hashes are not in the lock.
ARG CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG CPU_TORCH=
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ "$TORCH" = cpu ]; then \
        specs=${CPU_TORCH:-$(sed -n 's/^\(torch\(vision\)\?==[0-9.]*\).*/\1/p' /locks/requirements.lock)} \
        && /opt/uv/bin/uv pip install --no-deps --default-index "$CPU_TORCH_INDEX" $specs \
        && sed -i '/^\(torch\|torchvision\|triton\)==\|^\(cuda\|nvidia\)-/,/[^\\]$/d' /locks/requirements.lock; \
    fi \
    && /opt/uv/bin/uv pip install --no-deps --require-hashes --requirements /locks/requirements.lock \
        --build-constraints /locks/requirements.lock
COPY pyproject.toml README.md LICENSE /source/
COPY anyres_vlm /source/anyres_vlm
COPY configs /source/configs
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv pip install --no-deps /source \
        --build-constraints /locks/requirements.lock --build-constraints /locks/requirements-test.lock \
    && /opt/uv/bin/uv pip check

FROM build AS build-test
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv pip install --no-deps --require-hashes --requirements /locks/requirements-test.lock

FROM python AS test
COPY --from=build-test /opt/venv /opt/venv
COPY --chown=anyres . .
USER 10001
ENTRYPOINT ["pytest", "-p", "no:cacheprovider"]
HEALTHCHECK NONE

FROM python AS runtime
COPY --from=build /opt/venv /opt/venv
COPY configs configs
RUN ln -s /workspace/configs/cluster/launch /usr/local/bin/anyres-launch && install -d -o anyres -m 1777 data runs
USER 10001
ENTRYPOINT ["anyres"]
CMD ["--help"]
# A batch command has no health other than its exit status; torchrun monitors the ranks, and a silent rank ends the run.
HEALTHCHECK NONE
