// Numbers, times and sizes for people.

const whole = new Intl.NumberFormat("en-GB");
const compact = new Intl.NumberFormat("en-GB", { notation: "compact", maximumFractionDigits: 1 });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const full = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export const SECOND = 1000;
export const MINUTE = 60 * SECOND;
export const HOUR = 60 * MINUTE;
export const DAY = 24 * HOUR;

export const count = (number) => whole.format(number);
export const short = (number) => (number < 10_000 ? whole.format(number) : compact.format(number));
export const dayOf = (date) => day.format(date);
export const timeOf = (date) => clock.format(date);
export const fullTime = (text) => full.format(new Date(text));

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

/** Return how long ago something was, in one unit. */
export function ago(text) {
  const ms = Date.now() - Date.parse(text);
  if (ms < 5 * SECOND) return "just now";
  for (const [size, name] of [[DAY, "d"], [HOUR, "h"], [MINUTE, "min"], [SECOND, "s"]]) {
    if (ms >= size) return `${Math.floor(ms / size)} ${name} ago`;
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
