// What the keys do. Lists mark what can be stepped through with data-item.

import { h } from "./dom.js";
import { go, href } from "./route.js";
import { toggle } from "./theme.js";

const SHORTCUTS = [
  ["/", "Search runs"],
  ["j  k", "Next, previous line"],
  ["Enter", "Open the line"],
  ["g o", "Go to the overview"],
  ["g r", "Go to the runs"],
  ["g a", "Go to the agents"],
  ["g s", "Go to the stale runs"],
  ["t", "Light or dark"],
  ["?", "This help"],
  ["Esc", "Leave a field, close this help"],
];
const PLACES = { o: "overview", r: "runs", a: "agents", s: "stale" };
const SECOND_KEY_MS = 1500;
let wentAt = -Infinity;
let stepper = null;

/** Let a view with more lines than the document holds do the stepping; null gives it back. */
export function stepWith(step) {
  stepper = step;
}

function step(by) {
  if (stepper !== null) return stepper(by);
  const lines = [...document.querySelectorAll("main [data-item]")].filter((line) => line.checkVisibility());
  const at = lines.indexOf(document.activeElement);
  const next = lines[at === -1 ? (by > 0 ? 0 : lines.length - 1) : at + by];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

function search() {
  const field = [...document.querySelectorAll("main [data-search]")].find((input) => input.checkVisibility());
  if (field === undefined) return go(href("runs", { focus: "1" }));
  field.focus();
  field.select();
}

/** Show the shortcuts. */
export function help() {
  if (document.querySelector("dialog[open]") !== null) return;
  const rows = SHORTCUTS.map(([keys, what]) => h("div", {}, h("dt", {}, keys.split(/\s+/).map((key) => h("kbd", {}, key))), h("dd", {}, what)));
  const close = () => dialog.close();
  const dialog = h(
    "dialog",
    { class: "dialog", "aria-labelledby": "help-title", on: { close: () => dialog.remove() } },
    h("h2", { id: "help-title" }, "Keyboard"),
    h("dl", { class: "keys" }, rows),
    h("div", { class: "actions" }, h("button", { type: "button", class: "button primary", on: { click: close } }, "Close")),
  );
  document.body.append(dialog);
  dialog.showModal();
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest("input, select, textarea");
  if (field !== null) {
    if (event.key === "Escape") {
      event.preventDefault(); // a field for searches would also empty itself
      field.blur();
    }
    return;
  }
  if (document.querySelector("dialog[open]") !== null) return;
  const actions = { "/": search, j: () => step(1), k: () => step(-1), t: toggle, "?": help };
  if (event.timeStamp - wentAt < SECOND_KEY_MS && event.key in PLACES) {
    wentAt = -Infinity;
    go(href(PLACES[event.key]));
  } else if (event.key === "g") {
    wentAt = event.timeStamp;
    return;
  } else if (event.key in actions) {
    actions[event.key]();
  } else {
    return;
  }
  event.preventDefault();
}

/** Listen to the keys. */
export function listen() {
  document.addEventListener("keydown", press);
  document.getElementById("help").addEventListener("click", help);
}
