# The service in two images. The API's has no torch, and is the default: `docker build .`
# The worker's fits models: `docker build --target worker .`, for NVIDIA GPUs with
# `--build-arg TORCH_INDEX=https://pypi.org/simple`, where torch brings CUDA along.
# `python benchmarks/image.py` runs these steps without a container engine.
FROM python:3.11-slim AS build-api
WORKDIR /build
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY client client
COPY service service
COPY migrations migrations
RUN python -m venv --without-pip /opt/evenodds \
    && python -m pip --python /opt/evenodds/bin/python install --no-cache-dir --constraint constraints.txt '.[api,telemetry]'

RUN python -m venv /opt/sbom && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom \
    && /opt/sbom/bin/cyclonedx-py environment --output-file /opt/evenodds/sbom.cdx.json /opt/evenodds/bin/python

FROM build-api AS build-worker
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip --python /opt/evenodds/bin/python install --no-cache-dir --constraint constraints.txt --index-url "$TORCH_INDEX" torch \
    && python -m pip --python /opt/evenodds/bin/python install --no-cache-dir --constraint constraints.txt '.[service,telemetry]' \
    && /opt/sbom/bin/cyclonedx-py environment --output-file /opt/evenodds/sbom.cdx.json /opt/evenodds/bin/python

FROM python:3.11-slim AS runtime
# By number, so that Kubernetes sees that it is not root. /data holds the SQLite file where no EVENODDS_DATABASE_URL is
# given, and models from a hub.
RUN useradd --uid 10001 --create-home evenodds && mkdir /data && chown evenodds:evenodds /data
ENV PATH=/opt/evenodds/bin:/usr/local/bin:/usr/bin:/bin HF_HOME=/data/huggingface
USER 10001:10001
WORKDIR /data

FROM runtime AS worker
COPY --from=build-worker /opt/evenodds /opt/evenodds
CMD ["evenodds", "work"]

# Also `evenodds migrate` and `evenodds keys`.
FROM runtime AS api
COPY --from=build-api /opt/evenodds /opt/evenodds
ENV EVENODDS_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('EVENODDS_PORT', '8000') + '/readyz', timeout=4)"]
CMD ["evenodds", "serve"]
