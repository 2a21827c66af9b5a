# Two targets of one build: `serve` (the default) answers requests, `distill` trains. Both run as a user without rights.
#
#   docker build -t fewstep .                                     serve on a CPU
#   docker build -t fewstep-distill --target distill .            train on a CPU
#   docker build -t fewstep --build-arg DEVICE=cuda .             serve on an NVIDIA GPU: docker run --gpus all ...
#
# PyTorch comes from pip's index as your platform has it. To choose another build of it (without CUDA and much smaller, or
# for another CUDA release) pass what pip needs: --build-arg PIP_EXTRA_ARGS="--extra-index-url <see PyTorch's install page>".
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS fewstep
ARG PIP_EXTRA_ARGS=""
ARG DEVICE=cpu
ENV FEWSTEP_DEVICE=${DEVICE} OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
RUN useradd --create-home --home-dir /fewstep --uid 1000 fewstep
WORKDIR /fewstep
COPY pyproject.toml constraints.txt README.md LICENSE /source/
COPY distillers /source/distillers
COPY app /source/app
RUN --mount=type=cache,target=/root/.cache/pip cd /source && pip install -c constraints.txt ${PIP_EXTRA_ARGS} '.[raster,openvino]'
# The published weights go along; a new named volume mounted here starts as a copy of them.
COPY --chown=fewstep:fewstep weights weights
USER fewstep
VOLUME /fewstep/weights

FROM fewstep AS distill
ENTRYPOINT ["fewstep", "distill"]
CMD ["--help"]

FROM fewstep AS serve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
CMD ["fewstep", "serve", "--host", "0.0.0.0"]
