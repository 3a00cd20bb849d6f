# nmoe on GPUs; the measured versions, of constraints-gpu.txt:
#   docker build --file docker/gpu.Dockerfile --tag nmoe:gpu .
FROM python:3.12-slim-bookworm

# Triton calls a C compiler. No version: Debian keeps the newest one alone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nmoe \
    && install --directory --owner=nmoe --group=nmoe /workspace

WORKDIR /opt/nmoe
COPY constraints-gpu.txt pyproject.toml README.md LICENSE ./
COPY configs configs
COPY nmoe nmoe
RUN pip install --no-cache-dir --constraint constraints-gpu.txt torch==2.11.0 '.[data,telemetry,viz]'

USER 10001
WORKDIR /workspace
CMD ["nmoe", "doctor"]
