"""telemetryd: the one daemon that owns a telemetry database."""

SERVER_HEADER = "Telemetry-Server"
"""Every answer of the daemon has this header; those of a proxy in between, or of another server, have not."""

__version__ = "4.0.0"
