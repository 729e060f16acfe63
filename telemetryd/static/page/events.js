// The events of a run: pages from either end, all or those that hold a text; a run that failed or still runs opens at its
// last ones.

import { address, page, runPath } from "./api.js";
import { h } from "./dom.js";
import { duration, fullTime } from "./format.js";
import { fillLater, panel, problem, sentence } from "./parts.js";
import { go, href } from "./route.js";
import { payload } from "./texts.js";

const FIRST = 25; // an event may hold a megabyte
const MORE = 100;
const MOST_DRAWN = 2000;
const FROM_THE_START = ["success", "cancelled"];
const TYPING_MS = 350;

function line(event, begin) {
  return h("li", { class: /error|fail|warn/i.test(event.event_type) ? "loud" : null },
    h("span", { class: "at", title: `${fullTime(event.timestamp)} (${event.timestamp})` }, `+${duration(Math.max(0, Date.parse(event.timestamp) - begin))}`),
    h("b", {}, event.event_type),
    event.payload && payload(event.payload));
}

/**
 * Return the panel of a run's events, what shows them as far as a run has come, and what follows the address, which holds
 * as `find` the text that they hold and as `events` the end (first or last) from which they are read.
 */
export function eventsPanel(name, parameters, signal) {
  const path = `${runPath(name)}/events`;
  const place = h("div", { class: "body" }, sentence("Asking …"));
  const ends = h("div", { class: "ends", role: "group", "aria-label": "Which events", hidden: true });
  const search = h("input", { type: "search", id: "find-events", placeholder: "Type or payload holds", autocomplete: "off", on: { input: typed, change: find } });
  const tools = h("div", { class: "event-tools", hidden: true }, h("label", { for: search.id, class: "unseen" }, "Find events"), search, ends);
  const whole = panel("Events", place, { tools });
  const list = h("ol", { class: "timeline" });
  let asked = parameters;
  let status = null; // unknown until there is a run
  let fromEnd = null;
  let next = null; // the page after those that are shown, in their direction
  let latest = null; // the last event of all that are shown
  let begin = 0;
  let timer = null;
  let loading = new AbortController();
  signal.addEventListener("abort", () => loading.abort(), { once: true });

  const buttons = [["First events", "first"], ["Last events", "last"]].map(([text, end]) => {
    const button = h("button", { type: "button", class: "button small", on: { click: () => lead({ events: end }) } }, text);
    button.end = end;
    return button;
  });
  ends.append(...buttons);

  function lead(given) {
    go(href("run", { ...asked, ...given }, name), true);
  }

  function find() {
    clearTimeout(timer);
    lead({ find: search.value.trim() });
  }

  function typed() {
    clearTimeout(timer);
    timer = setTimeout(find, TYPING_MS);
  }

  function add(events, isAtFront) {
    const lines = events.map((event) => line(event, begin));
    if (isAtFront) list.prepend(...lines.reverse());
    else list.append(...lines);
  }

  function draw() {
    const words = fromEnd ? "Show earlier events" : "Show later events";
    const isFull = list.children.length >= MOST_DRAWN;
    const more = next && (isFull ? sentence(`${MOST_DRAWN} are shown; the API has all: ${path}`) : h("button", { type: "button", class: "button", on: { click: showMore } }, words));
    const none = sentence(asked.find ? "No event holds this text." : "It reported no events.");
    place.replaceChildren(...[fromEnd && more, list.children.length ? list : none, !fromEnd && more].filter(Boolean));
    if (list.children.length || asked.find) tools.hidden = false;
    if (next) ends.hidden = false; // if all are there, both ends are
    for (const button of buttons) button.setAttribute("aria-pressed", String((button.end === "last") === fromEnd));
  }

  async function showMore(event) {
    const mine = loading.signal;
    event.target.disabled = true;
    const top = list.firstChild;
    const before = top.getBoundingClientRect().top;
    try {
      const answer = await page(next.replace(/limit=\d+/, `limit=${MORE}`), mine);
      next = answer.next;
      add(answer.items, fromEnd);
      if (!fromEnd) latest = answer.items.at(-1) ?? latest;
      draw();
      if (fromEnd) scrollBy(0, top.getBoundingClientRect().top - before); // what is being read stays where it is
      place.querySelector(":scope > .button")?.focus({ preventScroll: true });
    } catch (error) {
      if (!mine.aborted) place.append(problem(error.message));
    }
  }

  async function load(end, mine) {
    const answer = await page(address(path, { text: asked.find, sort: `${end ? "-" : ""}timestamp`, limit: FIRST }), mine);
    if (mine.aborted) return [];
    fromEnd = end;
    next = answer.next;
    latest = (end ? answer.items[0] : answer.items.at(-1)) ?? null;
    list.replaceChildren();
    add(answer.items, end);
    draw();
    return [...place.childNodes];
  }

  function open() {
    loading.abort(); // what was asked before must not come after this
    loading = new AbortController();
    const { signal: mine } = loading;
    const end = asked.events === "last" || (asked.events !== "first" && !FROM_THE_START.includes(status));
    return fillLater(place, mine, () => load(end, mine));
  }

  async function catchUp() {
    if (!fromEnd && next) return; // what is new comes after what is shown
    const mine = loading.signal;
    const answer = await page(address(path, { text: asked.find, limit: MORE, cursor: `${latest.timestamp},${latest.id}` }), mine);
    if (mine.aborted) return;
    if (answer.next && fromEnd) {
      await load(true, mine); // too many to show those between
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
    status ??= run.status; // which end is shown does not change while somebody reads
    if (fromEnd === null) return open();
    return (latest ? catchUp() : open()).catch(() => {}); // the next look may succeed
  }

  function follow(given) {
    const isOther = given.find !== asked.find || given.events !== asked.events;
    asked = given;
    if (search !== document.activeElement) search.value = given.find ?? "";
    if (isOther && status !== null) open();
  }

  search.value = asked.find ?? "";
  return { whole, show, change: follow };
}
