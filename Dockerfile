# The image: the service and what Triton needs at run time. No weights, no token.
#
# BASE is any Debian with Python 3.11 or newer, its venv module and its headers. The CUDA libraries come with
# torch's wheels and the driver from the host, so a CUDA base would only bring them a second time.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS builder
# One more index to find wheels in: one with another build of the same torch, such as PyTorch's own of CPU builds, which
# bring no CUDA libraries, or of builds for the CUDA that an older driver knows (docs/container.md).
ARG PIP_EXTRA_INDEX_URL=""
# The lock to install from. Empty stands for the one with the hashes of every file, or, with another index, whose builds
# differ in bytes, for the one without.
ARG LOCK=""
# Extras to install too: otel, which sends traces (docs/tracing.md).
ARG EXTRAS=""
WORKDIR /src
RUN python3 -m venv /opt/klein
ENV PATH=/opt/klein/bin:${PATH}
COPY requirements.lock requirements.hashes.lock ./
# 5.2 GB, counted by the wheels: 4.8 of them torch with CUDA, 0.2 comfy-kitchen.
RUN --mount=type=cache,target=/root/.cache/pip \
    other="${PIP_EXTRA_INDEX_URL:+requirements.lock}" \
    && pip install --disable-pip-version-check --no-compile --requirement "${LOCK:-${other:-requirements.hashes.lock}}"
COPY pyproject.toml README.md LICENSE NOTICE requirements-test.lock ./
COPY app ./app
COPY docker/slim.py /src/slim.py
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --disable-pip-version-check --no-compile \
    --constraint requirements.lock --constraint requirements-test.lock ".${EXTRAS:+[${EXTRAS}]}" \
    && python3 -I /src/slim.py "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

FROM ${BASE} AS runtime
# Triton writes C when the service starts: it needs a compiler, libc's headers and Python's here, not only in the
# builder. What compiles for other purposes goes again: link-time optimisation, sanitizers. Debian's own point releases
# may move, the release may not.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /usr/share/man/* \
    && find /usr/share/doc -type f ! -name copyright -delete \
    && find /usr/lib/gcc -type f \( -name lto1 -o -name 'lib*san*' \) -delete \
    && test -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    && groupadd --gid 10001 klein \
    && useradd --uid 10001 --gid 10001 --home-dir /models --no-create-home --shell /usr/sbin/nologin klein \
    && install --directory --owner=10001 --group=10001 --mode=0750 /models
COPY --from=builder /opt/klein /opt/klein
COPY docker/healthcheck.py /opt/klein/healthcheck.py

# Everything that is written lies in the one volume, so the root can be read-only and a second start is warm.
ENV PATH=/opt/klein/bin:${PATH} \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/models \
    HF_HOME=/models/huggingface \
    KLEIN_CACHE_DIR=/models/klein \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/models"]
WORKDIR /models
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# A first start downloads and compiles: the start period, not the timeout, is what gives it time.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-IS", "/opt/klein/healthcheck.py"]
ENTRYPOINT ["klein"]
CMD ["serve"]
