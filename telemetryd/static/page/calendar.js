// A year in squares: a column for each week, a square for each day, darker with more runs, marked where many failed.

import { h, s } from "./dom.js";
import { DAY, count, counted, dayOf, percent } from "./format.js";
import { midnight } from "./range.js";
import { go } from "./route.js";

const SIZE = 11;
const PITCH = 13;
const TOP = 16;
const LEFT = 28;
const WEEKS = 53;
const LEVELS = 4;
const NOON = DAY / 2; // a day may begin a little before its date does
const MONTH = new Intl.DateTimeFormat("en-GB", { month: "short" });

/** Below this success rate a day is marked. */
export const POOR = 0.8;

/** Return the beginning of the Monday that begins the oldest of the weeks shown. */
export function firstDay(now) {
  const weekday = (new Date(midnight(now) + NOON).getDay() + 6) % 7;
  return midnight(now, -weekday - 7 * (WEEKS - 1));
}

/**
 * Return the calendar of one agent. `days` has by its midnight (ms) `{runs, finished, success_rate}`; `hrefOf(from, to)` says
 * what a click on a day leads to.
 */
export function calendar(agent, days, now, hrefOf) {
  const first = firstDay(now);
  const most = Math.max(1, ...[...days.values()].map((day) => day.runs));
  const width = LEFT + WEEKS * PITCH;
  const sum = [...days.values()].reduce((runs, day) => runs + day.runs, 0);
  const poor = [...days.values()].filter((day) => day.success_rate !== null && day.success_rate < POOR).length;
  const picture = s("svg", { class: "calendar", viewBox: `0 0 ${width} ${TOP + 7 * PITCH}`, width, height: TOP + 7 * PITCH, "aria-hidden": "true" });
  for (const [row, name] of [[0, "Mon"], [2, "Wed"], [4, "Fri"]]) {
    picture.append(s("text", { x: 0, y: TOP + row * PITCH + 9, class: "tick" }, name));
  }
  let month = null;
  let label = null;
  for (let index = 0, date = first; date <= now; index += 1, date = midnight(first, index)) {
    const [week, row] = [Math.floor(index / 7), index % 7];
    const [x, y] = [LEFT + week * PITCH, TOP + row * PITCH];
    const name = MONTH.format(date + NOON);
    if (row === 0 && name !== month) {
      if (label !== null && week - label.week < 3) label.element.remove(); // no room for both
      label = { week, element: s("text", { x, y: 10, class: "tick" }, name) };
      if (week < WEEKS - 2) picture.append(label.element);
      month = name;
    }
    const day = days.get(date);
    const level = day ? Math.max(1, Math.ceil(LEVELS * Math.sqrt(day.runs / most))) : 0;
    const square = s("rect", { x, y, width: SIZE, height: SIZE, rx: 2, class: `level-${level}` });
    if (!day) {
      picture.append(square);
      continue;
    }
    const text = `${dayOf(date + NOON)}: ${counted(day.runs, "run")}, ${day.finished ? `${percent(day.success_rate)} succeeded` : "none finished"}`;
    const isPoor = day.success_rate !== null && day.success_rate < POOR;
    const mark = isPoor ? s("path", { d: `M${x + SIZE} ${y + 3}v${SIZE - 3}h-${SIZE - 3}z`, class: "poor" }) : null;
    picture.append(s("g", { class: "day", on: { click: () => go(hrefOf(date, midnight(date, 1))) } }, s("title", {}, text), square, mark));
  }
  const sentence = `${agent}: ${count(sum)} runs on ${days.size} days of the last year; on ${counted(poor, "day")} less than ${POOR * 100} % succeeded`;
  return h("div", { class: "scroll calendar-frame", role: "img", "aria-label": sentence, tabindex: "0" }, picture);
}

/** Return what the squares mean. */
export function calendarKey() {
  const square = (level, poor) =>
    s("svg", { viewBox: "0 0 11 11", width: 11, height: 11, "aria-hidden": "true" }, s("rect", { width: 11, height: 11, rx: 2, class: `level-${level}` }), poor ? s("path", { d: "M11 3v8h-8z", class: "poor" }) : null);
  return h("p", { class: "quiet calendar-key" }, "Fewer", [0, 1, 2, 3, 4].map((level) => square(level)), "more runs", square(2, true), `less than ${POOR * 100} % succeeded`);
}
