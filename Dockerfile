# syntax=docker/dockerfile:1
# One image for the controller, workers and the gateway; which of them runs is the command. What is installed is locked:
# `--build-arg REQUIREMENTS=core` has the echo and user-made backends, `demo` the transformers backend as well.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ARG REQUIREMENTS=core
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
RUN python -m venv /opt/zfabric
COPY requirements/ requirements/
# By hash, and nothing that the lock does not name. torch has a build for each accelerator, see requirements/README.md.
RUN /opt/zfabric/bin/pip install --no-deps --require-hashes --requirement "requirements/${REQUIREMENTS}.txt" \
    && if [ "${REQUIREMENTS}" = demo ]; then /opt/zfabric/bin/pip install --requirement requirements/torch.txt; fi
COPY pyproject.toml README.md LICENSE ./
COPY zfabric/ zfabric/
RUN PIP_BUILD_CONSTRAINT=/source/requirements/build.txt /opt/zfabric/bin/pip install --no-deps . \
    && /opt/zfabric/bin/python -m compileall -q /opt/zfabric/lib

FROM python:${PYTHON}-slim
RUN groupadd --gid 10001 zfabric \
    && useradd --uid 10001 --gid zfabric --no-create-home --home-dir /var/lib/zfabric zfabric \
    && install --directory --owner=zfabric --group=zfabric --mode=0700 /run/zfabric /var/lib/zfabric
COPY --from=build /opt/zfabric /opt/zfabric
ENV PATH=/opt/zfabric/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ZFABRIC_ENDPOINT=ipc:///run/zfabric/controller.sock
USER 10001:10001
WORKDIR /var/lib/zfabric
STOPSIGNAL SIGTERM
# Of the controller, which everything else reaches by $ZFABRIC_ENDPOINT as well.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["zfabric", "ping", "--quiet", "--timeout", "3"]
CMD ["zfabric-controller", "--log-format", "json"]
