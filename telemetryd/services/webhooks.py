"""Posts one signed message to a webhook, and describes the outcome in a sentence."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import Final

import aiohttp

import telemetryd
from telemetryd.model.rules import Webhook

TIMEOUT_S: Final = 10.0
SIGNATURE: Final = "Telemetry-Signature"
TIMESTAMP: Final = "Telemetry-Timestamp"
DELIVERY: Final = "Telemetry-Delivery"


def open_session(timeout_s: float = TIMEOUT_S) -> aiohttp.ClientSession:
    """Return a session for webhooks: without cookies, and each request within its time."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"telemetryd/{telemetryd.__version__}"},
    )


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """Return the value of the signature's header: HMAC-SHA256 over the timestamp, a dot, and the body."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


async def post(session: aiohttp.ClientSession, webhook: Webhook, message_id: str, body: str) -> str | None:
    """Send a message once; return None if it was confirmed (2xx), else what went wrong, without the address's path."""
    timestamp, data = str(int(time.time())), body.encode()
    headers = {
        "Content-Type": "application/json",
        DELIVERY: message_id,
        TIMESTAMP: timestamp,
        SIGNATURE: sign(webhook.secret, timestamp, data),
    }
    try:
        # A redirect would carry the message to an address that was not configured.
        async with session.post(webhook.url, data=data, headers=headers, allow_redirects=False) as response:
            return None if 200 <= response.status < 300 else f"it answered {response.status}"
    except TimeoutError:
        return "it did not answer in time"
    except aiohttp.ClientConnectorError as error:
        return f"it cannot be reached: {error.os_error.strerror or type(error.os_error).__name__}"
    except (aiohttp.ClientError, ValueError) as error:  # their texts may hold the address
        return f"it cannot be reached: {type(error).__name__}"
