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
# Only what is in the image. /health needs no token; with TLS it is asked for over the Unix socket, which speaks plain HTTP.
HEALTHCHECK --interval=30s --timeout=10s --start-period=40s \
    CMD ["python", "-c", "import http.client, os, socket, sys\ne = os.environ.get\nc = http.client.HTTPConnection('127.0.0.1', int(e('TELEMETRY_API_PORT') or 8765), timeout=5)\nif e('TELEMETRY_TLS_CERT'):\n    c.sock = socket.socket(socket.AF_UNIX)\n    c.sock.connect(e('TELEMETRY_API_UNIX') or e('TELEMETRY_DB_PATH') + '.sock')\nc.request('GET', '/health')\nsys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["telemetryd"]
CMD ["serve"]
