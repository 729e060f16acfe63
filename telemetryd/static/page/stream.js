// Follows the daemon's stream of runs. EventSource cannot send the token, so this reads the stream itself.

import { ApiError, address, send } from "./api.js";

const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15_000;

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = { event: "message", data: "" };
      for (const line of block.split(/\r?\n/)) {
        const field = /^(event|data|id): ?(.*)$/.exec(line);
        if (field) event[field[1]] = field[1] === "data" ? event.data + field[2] : field[2];
      }
      if (event.data) yield event;
    }
  }
}

const pause = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });

/**
 * Call `onRun` for each run that is created or changed, until `signal` aborts; a broken stream goes on where it broke.
 * `onState` gets "live", "waiting" (a new attempt follows) or, with a sentence, "refused"; `onMissed` how many
 * runs did not come because this page was too slow.
 */
export async function follow(parameters, signal, { onRun, onMissed, onState }) {
  let last = null;
  let wait = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": last }) };
      const response = await send(address("api/v1/runs/stream", parameters), { signal, headers });
      onState("live");
      wait = FIRST_PAUSE_MS;
      for await (const event of events(response.body)) {
        last = event.id ?? last;
        if (event.event === "run") onRun(JSON.parse(event.data));
        if (event.event === "missed") onMissed(JSON.parse(event.data).missed);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) {
        onState("refused", error.message);
        return;
      }
    }
    if (signal.aborted) return;
    onState("waiting");
    await pause(wait, signal);
    wait = Math.min(2 * wait, LONGEST_PAUSE_MS);
  }
}
