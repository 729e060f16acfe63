#!/usr/lib/telemetryd/bin/python3
"""Runs telemetryd in the virtual environment of the package."""

import sys

from telemetryd.cli import main

sys.exit(main())
