// The events of a run: pages from either end; a run that failed or still runs opens at its last ones.

import { page, runPath } from "./api.js";
import { h } from "./dom.js";
import { duration } from "./format.js";
import { fillLater, panel, problem, sentence } from "./parts.js";
import { payload } from "./texts.js";

const FIRST = 25; // an event may hold a megabyte
const MORE = 100;
const MOST_DRAWN = 2000;
const FROM_THE_START = ["success", "cancelled"];

function line(event, begin) {
  return h("li", { class: /error|fail|warn/i.test(event.event_type) ? "loud" : null },
    h("span", { class: "at", title: event.timestamp }, `+${duration(Math.max(0, Date.parse(event.timestamp) - begin))}`),
    h("b", {}, event.event_type),
    event.payload && payload(event.payload));
}

/** Return the panel of a run's events, and what shows them as far as a run has come. */
export function eventsPanel(name, signal) {
  const path = `${runPath(name)}/events`;
  const place = h("div", { class: "body" }, sentence("Asking …"));
  const ends = h("div", { class: "ends", role: "group", "aria-label": "Which events", hidden: true });
  const whole = panel("Events", place, { tools: ends });
  const list = h("ol", { class: "timeline" });
  let fromEnd = null; // unknown until there is a run
  let next = null; // the page after those that are shown, in their direction
  let latest = null; // the last event of all that are shown
  let begin = 0;

  const buttons = [["First events", false], ["Last events", true]].map(([text, end]) => {
    const button = h("button", { type: "button", class: "button small", on: { click: () => open(end) } }, text);
    button.end = end;
    return button;
  });
  ends.append(...buttons);

  function add(events, isAtFront) {
    const lines = events.map((event) => line(event, begin));
    if (isAtFront) list.prepend(...lines.reverse());
    else list.append(...lines);
  }

  function draw() {
    const words = fromEnd ? "Show earlier events" : "Show later events";
    const isFull = list.children.length >= MOST_DRAWN;
    const more = next && (isFull ? sentence(`${MOST_DRAWN} are shown; the API has all: ${path}`) : h("button", { type: "button", class: "button", on: { click: showMore } }, words));
    place.replaceChildren(...[fromEnd && more, list.children.length ? list : sentence("It reported no events."), !fromEnd && more].filter(Boolean));
    if (next) ends.hidden = false; // if all are there, both ends are
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.end === fromEnd));
  }

  async function showMore(event) {
    event.target.disabled = true;
    const top = list.firstChild;
    const before = top.getBoundingClientRect().top;
    try {
      const answer = await page(next.replace(/limit=\d+/, `limit=${MORE}`), signal);
      next = answer.next;
      add(answer.items, fromEnd);
      if (!fromEnd) latest = answer.items.at(-1) ?? latest;
      draw();
      if (fromEnd) scrollBy(0, top.getBoundingClientRect().top - before); // what is being read stays where it is
      place.querySelector(":scope > .button")?.focus({ preventScroll: true });
    } catch (error) {
      if (!signal.aborted) place.append(problem(error.message));
    }
  }

  async function load(end) {
    const answer = await page(`${path}?sort=${end ? "-" : ""}timestamp&limit=${FIRST}`, signal);
    fromEnd = end;
    next = answer.next;
    latest = (end ? answer.items[0] : answer.items.at(-1)) ?? null;
    list.replaceChildren();
    add(answer.items, end);
    draw();
    return [...place.childNodes];
  }

  const open = (end) => fillLater(place, signal, () => load(end));

  async function catchUp() {
    if (!fromEnd && next) return; // what is new comes after what is shown
    const answer = await page(`${path}?limit=${MORE}&cursor=${latest.timestamp},${latest.id}`, signal);
    if (answer.next && fromEnd) {
      await load(true); // too many to show those between
      return;
    }
    next = fromEnd ? next : answer.next;
    latest = answer.items.at(-1) ?? latest;
    add(answer.items, false);
    while (fromEnd && list.children.length > MOST_DRAWN) list.firstChild.remove();
    draw();
  }

  /** Show the events of a run that has changed. */
  function show(run) {
    begin = Date.parse(run.start_time);
    if (fromEnd === null) return open(!FROM_THE_START.includes(run.status));
    return (latest ? catchUp() : open(fromEnd)).catch(() => {}); // the next look may succeed
  }

  return { whole, show };
}
