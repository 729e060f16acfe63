// Numbers, times and sizes for people. Times are those of the reader's own clock, whose zone `ZONE` names.

export const SECOND = 1000;
export const MINUTE = 60 * SECOND;
export const HOUR = 60 * MINUTE;
export const DAY = 24 * HOUR;

const whole = new Intl.NumberFormat("en-GB");
const compact = new Intl.NumberFormat("en-GB", { notation: "compact", maximumFractionDigits: 1 });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const date = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const full = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", timeZoneName: "short" });

export const count = (number) => whole.format(number);
export const short = (number) => (number < 10_000 ? whole.format(number) : compact.format(number));
/** Return a day, with its year unless it is this one. */
export const dayOf = (ms) => (new Date(ms).getFullYear() === new Date().getFullYear() ? day : date).format(ms);
export const timeOf = (ms) => clock.format(ms);
export const fullTime = (text) => full.format(new Date(text));
export const ZONE = full.resolvedOptions().timeZone;

let ahead = 0; // how many ms the daemon's clock is ahead of this one
const ALIKE = 2 * SECOND;

/** Return the moment in ms by the daemon's clock, which may differ from the browser's. */
export const now = () => Date.now() + ahead;

/** Take the time that an answer of the daemon bears. */
export function setClock(text) {
  const difference = Date.parse(text) - Date.now();
  if (Number.isFinite(difference)) ahead = Math.abs(difference) > ALIKE ? difference : 0;
}

const FUTURE = MINUTE; // by so much two clocks may differ

/** Return whether a moment lies in the future, so that somebody's clock is wrong. */
export const isAhead = (text) => Date.parse(text) - now() > FUTURE;

/** Return a number with its noun: 1 run, 2 runs. */
export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Return a share as per cent; never 100 % while something failed, never 0 % while something succeeded. */
export function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = share * 100;
  if (value > 99.9 && value < 100) return "99.9 %";
  if (value > 0 && value < 0.1) return "0.1 %";
  return `${value.toFixed(value === 100 || value === 0 ? 0 : 1)} %`;
}

/** Return milliseconds in the two units that matter. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < SECOND) return `${Math.round(ms)} ms`;
  if (ms < MINUTE) return `${(ms / SECOND).toFixed(ms < 10 * SECOND ? 1 : 0)} s`;
  const pairs = [[DAY, "d", HOUR, "h"], [HOUR, "h", MINUTE, "min"], [MINUTE, "min", SECOND, "s"]];
  const [large, largeName, little, littleName] = pairs.find(([size]) => ms >= size);
  const rest = Math.floor((ms % large) / little);
  return `${Math.floor(ms / large)} ${largeName}${rest ? ` ${rest} ${littleName}` : ""}`;
}

/** Return how long ago something was, or how long it will be until then, in one unit. */
export function ago(text) {
  const ms = now() - Date.parse(text);
  for (const [size, name] of [[DAY, "d"], [HOUR, "h"], [MINUTE, "min"], [SECOND, "s"]]) {
    if (isAhead(text) && -ms >= size) return `in ${Math.floor(-ms / size)} ${name}`;
    if (ms >= Math.max(size, 5 * SECOND)) return `${Math.floor(ms / size)} ${name} ago`;
  }
  return "just now";
}

export function bytes(number) {
  let value = number;
  for (const unit of ["bytes", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return unit === "bytes" ? `${value} bytes` : `${value.toFixed(1)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} TiB`;
}
