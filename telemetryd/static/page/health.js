// Asks how the daemon is, for the mark in the bar and for views that show more of it.

import { ApiError, get } from "./api.js";
import { plain } from "./dom.js";

const EVERY_MS = 10_000;
const listeners = new Set();
let latest = null;

/** Call `listener` with each answer of /health until `signal` aborts; at once if there was one. */
export function onHealth(listener, signal) {
  listeners.add(listener);
  signal.addEventListener("abort", () => listeners.delete(listener), { once: true });
  if (latest !== null) listener(latest);
}

async function look() {
  try {
    latest = await get("health", {}, undefined, [503]);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    latest = { status: "error", detail: error.message };
  }
  const mark = document.getElementById("health");
  const isWell = latest.status === "ok";
  mark.className = `pill ${isWell ? "well" : "ill"}`;
  mark.textContent = isWell ? "Healthy" : "Trouble";
  mark.title = isWell ? `telemetryd ${latest.version}: writes are taken` : plain(latest.detail);
  for (const listener of listeners) listener(latest);
}

/** Look now and from time to time, as long as somebody can see it. */
export function watchHealth() {
  look();
  setInterval(() => document.hidden || look(), EVERY_MS);
  document.addEventListener("visibilitychange", () => document.hidden || look());
}
