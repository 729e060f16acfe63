"""What telemetryd is compared with: a server that does nothing, and one that does it the usual way."""
