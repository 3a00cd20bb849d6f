# nmoe on CPUs, and for preparing data and `nmoe viz`; the pins of constraints.txt:
#   docker build --file docker/cpu.Dockerfile --tag nmoe:cpu .
FROM python:3.11-slim-bookworm

# torch calls a C compiler. No version: Debian keeps the newest one alone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nmoe \
    && install --directory --owner=nmoe --group=nmoe /workspace

WORKDIR /opt/nmoe
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY configs configs
COPY nmoe nmoe
RUN pip install --no-cache-dir --constraint constraints.txt torch==2.13.0 '.[data,viz]'

USER 10001
WORKDIR /workspace
CMD ["nmoe", "doctor"]
