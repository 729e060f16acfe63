// A time range of the reader's own. The address holds it as `from` and `to` (not included), in UTC; people read and
// write it in their local time.

import { h } from "./dom.js";
import { DAY, HOUR, MINUTE, ZONE, dayOf, timeOf } from "./format.js";

/** Return a moment (ms) as it stands in an address. */
export const moment = (ms) => new Date(ms).toISOString().replace(/(:00)?\.000Z$/, "Z");

/** Return the parameters of a range (ms). */
export const within = (from, to) => ({ from: moment(from), to: moment(to) });

/** Return the filters by which the daemon knows a range; it answers what is wrong with a moment that is none. */
export function filtersOf({ from, to }) {
  const filters = {};
  const begin = Date.parse(from);
  if (from) filters.created_after = Number.isNaN(begin) ? from : new Date(begin - 1).toISOString().replace("Z", "999Z"); // "after" leaves the moment itself out
  if (to) filters.created_before = Number.isNaN(Date.parse(to)) ? to : new Date(to).toISOString();
  return filters;
}

/** Return a range (ms) for people: 29 Nov, 22:00 – 30 Nov, 06:00. */
export function rangeText(from, to) {
  const [first, last] = [dayOf(from), dayOf(to)];
  return `${first}, ${timeOf(from)} – ${first === last ? "" : `${last}, `}${timeOf(to)}`;
}

/** Return from 22:00 of yesterday to 06:00 of today. */
export function lastNight(now) {
  const date = new Date(now);
  const at = (days, hour) => new Date(date.getFullYear(), date.getMonth(), date.getDate() - days, hour).getTime();
  return { from: at(1, 22), to: at(0, 6) };
}

/** Return a moment (ms) as a field for date and time holds it. */
function local(ms) {
  const offset = new Date(ms).getTimezoneOffset() * MINUTE;
  return new Date(ms - offset).toISOString().slice(0, ms % MINUTE ? -1 : "2026-11-30T22:00".length);
}

/** Return two fields for a range; `onChange` gets what they hold as parameters of the address. */
export function rangeFields(onChange) {
  const fields = [["from", "From"], ["to", "To"]].map(([name, label]) => {
    const input = h("input", { type: "datetime-local", id: `range-${name}`, name, max: "9999-12-31T23:59", on: { change } });
    return { name, input, element: h("div", { class: "field" }, h("label", { for: input.id }, label), input) };
  });
  const note = h("p", { class: "quiet range-note" }, ZONE);
  const element = h("div", { class: "range", role: "group", "aria-label": `Time range, ${ZONE}` }, fields.map((field) => field.element), note);

  function change(event) {
    event.stopPropagation();
    const given = Object.fromEntries(fields.map(({ name, input }) => [name, input.value && moment(new Date(input.value).getTime())]));
    const isEmpty = Boolean(given.from && given.to) && Date.parse(given.from) >= Date.parse(given.to);
    note.textContent = isEmpty ? "It ends before it begins." : ZONE;
    note.classList.toggle("bad-text", isEmpty);
    if (!isEmpty) onChange(given);
  }

  return {
    element,
    /** Show what the address says, where nobody is writing. */
    set(parameters) {
      for (const { name, input } of fields) {
        const ms = Date.parse(parameters[name] ?? "");
        if (input !== document.activeElement) input.value = Number.isNaN(ms) ? "" : local(ms);
      }
    },
  };
}

/** Return the hours, or beyond some days the days, from one moment to another: `[from, to]` each. */
export function buckets(from, to, hoursUpTo = 8 * DAY) {
  const made = [];
  const next = to - from > hoursUpTo ? (ms) => midnight(ms, 1) : (ms) => ms + HOUR;
  for (let at = from; at < to;) {
    const end = Math.min(next(at), to);
    made.push([at, end]);
    at = end;
  }
  return made;
}

/** Return how many whole hours local time is ahead of UTC; statistics know whole hours only. */
const hoursAhead = (ms) => Math.round(-new Date(ms).getTimezoneOffset() / 60);

/** Return the beginning of the day that a moment is in, or of one some days later, as far as whole hours allow. */
export function midnight(ms, later = 0) {
  // Where local time is not whole hours from UTC, a day begins half an hour early.
  const date = new Date(ms + (new Date(ms).getTimezoneOffset() % 60 ? HOUR / 2 : 0));
  const [year, month, day] = [date.getFullYear(), date.getMonth(), date.getDate() + later];
  return Date.UTC(year, month, day) - hoursAhead(new Date(year, month, day)) * HOUR;
}

/**
 * Return the spans of a time in which every day has 24 hours by one offset from UTC, for `bucket=1d`: a day on which
 * clocks change ends its span.
 */
export function spans(from, to) {
  const made = [];
  for (let day = from; day < to;) {
    const end = Math.min(midnight(day, 1), to);
    const ahead = hoursAhead(day);
    const last = made.at(-1);
    if (last?.ahead === ahead) last.to = end;
    else made.push({ ahead, from: day, to: end });
    day = end;
  }
  return made.map(({ ahead, from, to }) => ({ from: new Date(from).toISOString(), to: new Date(to).toISOString(), bucket: "1d", utc_offset: `${ahead < 0 ? "-" : "+"}${String(Math.abs(ahead)).padStart(2, "0")}:00` }));
}
