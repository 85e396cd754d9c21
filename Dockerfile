# One image for training and data preparation, and a small one for serving. `make test` in a container adds what tests need.
#   docker build -t gpsd .                               CUDA (torch's wheels carry the CUDA libraries; the host needs a driver)
#   docker build -t gpsd:cpu --build-arg FLAVOR=cpu .    CPU
#   docker build -t gpsd:serve --target serve .          a server alone, CPU: no torchrec, no tools of training
#   docker build --build-arg BASE=IMAGE ...             another base image with Python 3.11 and its venv module
#   docker run --gpus all --shm-size 16g -v "$PWD/runs:/app/runs" gpsd launch/local.sh --gin_file ...
ARG BASE=python:3.11-slim-bookworm
FROM $BASE AS serve
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 gpsd \
    && install --directory --owner=gpsd --group=gpsd /app /opt/venv
USER 1000
WORKDIR /app
COPY --chown=gpsd:gpsd requirements-serve.txt ./
COPY --chown=gpsd:gpsd .ci/setup_venv.sh .ci/uv.txt .ci/
RUN UV_COMPILE_BYTECODE=1 .ci/setup_venv.sh /opt/venv serve
COPY --chown=gpsd:gpsd gpsd_dist gpsd_dist
RUN python -m gpsd_dist.serve --help
# The artefact is mounted read-only; a container has to listen on its own address, not on its loopback.
ENTRYPOINT ["python", "-m", "gpsd_dist.serve"]
CMD ["/artefact", "--host", "0.0.0.0"]

FROM $BASE AS train

ARG FLAVOR=cuda
# VENV and FLAVOR are also what make reads in a container.
ENV VENV=/opt/venv \
    FLAVOR=$FLAVOR \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# make for the documented commands; a C compiler because Triton and torch.compile build their launchers at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 gpsd \
    && install --directory --owner=gpsd --group=gpsd /app /opt/venv

USER 1000
WORKDIR /app

# The requirements first: a change of the code does not install them again.
COPY --chown=gpsd:gpsd requirements.txt requirements-cpu.txt ./
COPY --chown=gpsd:gpsd .ci/setup_venv.sh .ci/uv.txt .ci/
RUN UV_COMPILE_BYTECODE=1 .ci/setup_venv.sh "$VENV" "$FLAVOR"

COPY --chown=gpsd:gpsd . .

# Fails the build of a broken CPU image. A CUDA image cannot be judged without a driver, so there it only informs;
# `docker run --gpus all gpsd` judges it.
RUN python -m gpsd_dist.doctor || [ "$FLAVOR" = cuda ]

CMD ["python", "-m", "gpsd_dist.doctor"]
