// Small parts that several views share.

import { h, say } from "./dom.js";
import { ago, duration, fullTime, isAhead } from "./format.js";

/** Return a moment as how long ago it was, or that it is still to come; the full time stands in its title. */
export function when(text) {
  if (!text) return "–";
  const future = isAhead(text);
  return h("time", { datetime: text, class: future && "future", title: `${future ? "Dated in the future: " : ""}${fullTime(text)} (${text})` }, ago(text), future && h("span", { class: "unseen" }, " (dated in the future)"));
}

/** Return a panel with a heading; `content` is what stands in it. */
export function panel(title, content, { id, note, tools } = {}) {
  const heading = h("h2", {}, title);
  return h("section", { class: "panel", id }, h("header", {}, heading, note && h("p", { class: "quiet" }, note), tools), content);
}

/** Return a sentence in place of what is not there. */
export const sentence = (text) => h("p", { class: "quiet empty" }, text);

/** Return what went wrong. */
export const problem = (text) => h("p", { class: "problem", role: "alert" }, text);

/** Fill a place with what `make` returns, once it is there, or with the sentence that says why it is not. */
export async function fillLater(place, signal, make) {
  place.setAttribute("aria-busy", "true");
  try {
    const content = await make();
    if (!signal.aborted) place.replaceChildren(...[content].flat());
  } catch (error) {
    if (signal.aborted) return;
    place.replaceChildren(problem(error.message));
  } finally {
    place.removeAttribute("aria-busy");
  }
}

async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Without TLS browsers have no clipboard, except on this machine; the old way works everywhere.
  const area = h("textarea", { class: "unseen" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Return a button that copies a text. */
export function copyButton(text, what) {
  const button = h("button", { type: "button", class: "button small", "aria-label": `Copy ${what}`, on: { click: copy } }, "Copy");
  async function copy() {
    await toClipboard(text);
    button.textContent = "Copied";
    say(`Copied ${what}`);
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }
  return button;
}

/** Return links, of which the chosen one is marked: a choice that stands in the address. */
export function choice(label, options, chosen) {
  const links = options.map(([value, text, address]) => h("a", { href: address, "aria-current": value === chosen ? "true" : null }, text));
  return h("nav", { class: "choice", "aria-label": label }, links);
}

/** The fields of a run that lists show: its long texts and its JSON stay where they are. */
export const IN_LISTS = [
  "event_id", "run_id", "parent_run_id", "agent_name", "job_type", "status", "created_at", "start_time", "updated_at", "end_time", "duration_ms",
  "items_succeeded", "items_failed", "items_skipped", "error_summary", "output_summary", "item_name", "input_summary",
].join(",");

/** Return how long a run took; null while it runs, and where nobody has reported it: it is 0 then, without an end. */
export const took = (run) => (run.status !== "running" && (run.duration_ms || run.end_time) ? duration(run.duration_ms) : null);

/** Return what a run says of itself in one line, as far as one can hold it. */
export const summaryOf = (run) => (run.error_summary || run.output_summary || run.item_name || run.input_summary || "").slice(0, 300);

/** Do something every so many milliseconds while the page is seen, until `signal` aborts. */
export function every(ms, signal, action) {
  const timer = setInterval(() => document.hidden || action(), ms);
  signal.addEventListener("abort", () => clearInterval(timer), { once: true });
}
