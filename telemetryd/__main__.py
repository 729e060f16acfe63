"""Lets `python -m telemetryd` do what the `telemetryd` command does."""

from telemetryd.cli import main

main()
