# docker build -t telemetryd .
# Works with a read-only root: the only place written to is the volume /data.
FROM python:3.13-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/telemetryd \
    && /opt/telemetryd/bin/pip install --no-cache-dir --disable-pip-version-check \
        --require-hashes --requirement requirements.lock \
    && /opt/telemetryd/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin telemetry \
    && install -d -o telemetry -g telemetry -m 0700 /data
COPY --from=build /opt/telemetryd /opt/telemetryd
ENV PATH=/opt/telemetryd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    TELEMETRY_DB_PATH=/data/telemetry.sqlite \
    TELEMETRY_LOG_FORMAT=json
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8765
STOPSIGNAL SIGTERM
# Only what is in the image: /health needs no token, and raise_for_status is urlopen's own behaviour.
HEALTHCHECK --interval=30s --timeout=10s --start-period=40s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('TELEMETRY_API_PORT', '8765') + '/health', timeout=5)"]
ENTRYPOINT ["telemetryd"]
CMD ["serve"]
