"""The benchmark: what telemetryd reaches of what HTTP, SQLite and the disk allow. See `python -m bench --help`."""
