"""telemetryd: the one daemon that owns a telemetry database."""

__version__ = "4.0.0"
