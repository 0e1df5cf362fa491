# A hospital: dials out, opens no port, trains next to the records. Build it with
#
#   docker build --file deploy/containers/hospital.Dockerfile --build-arg BASE=IMAGE@sha256:DIGEST --tag konsil-hospital .
#
# from the root of the repository. docs/deploy.md says how to choose BASE, and where torch comes from.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
# pip reads both: an index of the house, or one that has torch for CPUs.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deploy/constraints.txt deploy/constraints.txt
COPY shared_models shared_models
COPY auditor auditor
COPY client client
COPY server server
RUN python3 -m venv /opt/konsil \
    && /opt/konsil/bin/pip install --no-cache-dir --constraint deploy/constraints.txt '.[hospital,images,signals,sql,serve]'

FROM ${BASE}
# No shell to log in with; the numbers are what volumes and Kubernetes name. /var/lib/konsil is this party's own,
# /srv/konsil is what comes from outside: records, kits, evidence.
RUN groupadd --gid 10001 konsil \
    && useradd --uid 10001 --gid konsil --no-create-home --home-dir /var/lib/konsil --shell /usr/sbin/nologin konsil \
    && install --directory --owner konsil --group konsil --mode 0700 /var/lib/konsil /srv/konsil
COPY --from=build /opt/konsil /opt/konsil
# Bytecode was written at the build; nothing is written beside the code later, and nothing has to be.
ENV PATH=/opt/konsil/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/konsil
VOLUME /var/lib/konsil
# Whether the daemon that has this state folder runs: it is the one that `konsil-hospital stop` would end.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import pathlib, client.process as p; assert p.running(pathlib.Path('state'))"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["konsil-hospital"]
CMD ["start", "/var/lib/konsil/hospital.toml"]
