"""An agent that records runs as fast as it is told to, and notes in a journal whatever the client has promised."""

import itertools
import os
import sys
import time

from telemetryd.client import Client

url, folder, journal, pause_s = sys.argv[1:]
telemetry = Client(url, buffer_dir=folder, linger_s=0.05, file_bytes=200_000)
told = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for number in itertools.count():
    if number % 10:
        run = {"agent_name": "soak", "job_type": "recorded", "status": "success", "items_succeeded": number}
        run["item_name"] = f"{journal} {number}"
        event_id, events = telemetry.record(run), 0
    else:
        with telemetry.run("soak", "tracked", items_discovered=number, item_name=f"{journal} {number}") as tracked:
            tracked.items(succeeded=number)
            tracked.event("checkpoint", number=number)
        event_id, events = tracked.event_id, 1
    if event_id is not None:
        os.write(told, f"{event_id} {events}\n".encode())
    time.sleep(float(pause_s) if number % 20 == 0 else 0)
