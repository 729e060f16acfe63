"""What the commands that record runs share: their client, which says nothing while the daemon is away."""

from __future__ import annotations

import logging

from telemetryd.client.client import Client


def quiet_client() -> Client:
    """Return a client that logs errors only: that a run waits in the spool is no news to a cron job's mail."""
    logging.getLogger("telemetryd.client").setLevel(logging.ERROR)
    return Client.tolerant()
