"""What the commands that record runs share: their client, which says nothing while the daemon is away, and its end."""

from __future__ import annotations

import logging
from typing import Final

from telemetryd.client.client import Client

_LEFTOVERS_S: Final = 2.0


def quiet_client() -> Client:
    """Return a client that logs errors only: that a run waits in the spool is no news to a cron job's mail."""
    logging.getLogger("telemetryd.client").setLevel(logging.ERROR)
    return Client.tolerant()


def end(client: Client) -> None:
    """Send what can be sent; if the daemon took it, then also what earlier commands have left.

    Where only short commands report, nobody else would send that.
    """
    client.close()
    done = client.stats()
    if done["sent"] and done["problem"] is None:
        from telemetryd.client.leftovers import send_leftovers  # noqa: PLC0415 - most commands do without it

        send_leftovers(client.config, _LEFTOVERS_S)
