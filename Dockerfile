# rlhfctl on NVIDIA GPUs. torch's wheels bring CUDA; of the host only the driver and the container toolkit are needed.
#
#   docker build -t rlhfctl .                                       # EXTRAS: which extras of pyproject.toml
#   docker run --rm --gpus all rlhfctl doctor
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" -v hf:/cache -e HF_TOKEN rlhfctl ppo my.yaml --run-dir runs/a
#
# --ipc=host (or --shm-size=16g): processes of one run share memory. The run directory lies in the mounted /work, so a
# container that ends loses nothing; HF_TOKEN is given at run time and is never in the image.
FROM python:3.11-slim-bookworm AS build
ARG EXTRAS=train,vllm,serve,quant,tracking
# gcc and git: a few packages come as source. They stay in this stage.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/rlhfctl
ENV PATH=/opt/rlhfctl/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY rlhfctl rlhfctl
COPY recipes recipes
COPY completions completions
RUN pip install ".[$EXTRAS]"

FROM python:3.11-slim-bookworm
# gcc and the headers of libc: triton compiles its launchers on the machine that runs them.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 rlhfctl && mkdir -p /work /cache && chown rlhfctl /work /cache
COPY --from=build /opt/rlhfctl /opt/rlhfctl
ENV PATH=/opt/rlhfctl/bin:$PATH HF_HOME=/cache PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER rlhfctl
WORKDIR /work
# SIGTERM keeps a checkpoint at the step boundary: give `docker stop` the time of a step, `docker stop -t 600`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["rlhfctl"]
CMD ["--help"]
