# The service: `evenodds serve` by default; `evenodds work` and `evenodds migrate` run from the same image.
FROM python:3.11-slim

WORKDIR /build
COPY pyproject.toml README.md constraints.txt ./
COPY client client
COPY service service
COPY migrations migrations
RUN pip install --no-cache-dir --constraint constraints.txt '.[service]'

# /data holds the SQLite file where no EVENODDS_DATABASE_URL is given.
RUN useradd --create-home evenodds && mkdir /data && chown evenodds /data
USER evenodds
WORKDIR /data

ENV EVENODDS_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('EVENODDS_PORT', '8000') + '/readyz', timeout=4)"]
CMD ["evenodds", "serve"]
