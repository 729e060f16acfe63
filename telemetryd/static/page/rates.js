// Shares of runs, and how sure they are: a share of few runs comes with the interval that it lies in.

import { percent } from "./format.js";

const Z = 1.959963984540054; // 95 % of a normal distribution lie within so many standard deviations
const WIDE = 0.1; // an interval that leaves more than this open is worth showing

/** Return Wilson's 95 % interval of a share of runs (at least one), as telemetryd/model/intervals.py computes it. */
export function interval(part, whole) {
  const [share, weight] = [part / whole, (Z * Z) / whole];
  const middle = (share + weight / 2) / (1 + weight);
  const reach = (Z / (1 + weight)) * Math.sqrt((share * (1 - share)) / whole + weight / (4 * whole));
  return [Math.max(0, Math.min(share, middle - reach)), Math.min(1, Math.max(share, middle + reach))];
}

/** Return an interval as whole per cent, rounded outwards: 20–94 %. */
export const intervalText = ([low, high]) => `${Math.floor(low * 100)}–${Math.ceil(high * 100)} %`;

/** Return the interval of a share as text where the runs are so few that it says more than the share, else null. */
export function doubt(part, whole) {
  const bounds = interval(part, whole);
  return bounds[1] - bounds[0] > WIDE ? intervalText(bounds) : null;
}

/** Return a share of runs as text, with its interval where they are few; of no runs there is no share. */
export function share(part, whole) {
  if (whole === 0) return "no data";
  const open = doubt(part, whole);
  return `${percent(part / whole)}${open === null ? "" : ` (${open})`}`;
}

/** Return how many runs of a group of statistics succeeded: the daemon answers the share, rounded. */
export const successes = (group) => Math.round((group.success_rate ?? 0) * group.finished);
