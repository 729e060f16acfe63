// The statuses of a run: their order, and a shape for each, so that colour is never the only sign.

import { h, s } from "./dom.js";

/** From the bottom of a bar to its top; failures last, where they stand out. */
export const STATUSES = ["success", "running", "partial", "cancelled", "timeout", "failure"];
export const BAD = ["failure", "timeout"];

const SHAPES = {
  success: ["M3.5 8.5l3 3 6-7"],
  failure: ["M4 4l8 8M12 4l-8 8"],
  partial: ["M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11", "M8 2.5v11a5.5 5.5 0 0 0 0-11z"],
  timeout: ["M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11", "M8 5v3.2l2.2 1.6"],
  cancelled: ["M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11", "M4.2 11.8l7.6-7.6"],
  running: ["M5 3.5v9l7.5-4.5z"],
};
const FILLED = { partial: 1, running: 0 };

/** Return the shape of a status. */
export function shape(status) {
  const paths = (SHAPES[status] ?? []).map((d, index) => s("path", { d, class: FILLED[status] === index ? "filled" : null }));
  return s("svg", { class: "shape", viewBox: "0 0 16 16", "aria-hidden": "true" }, paths);
}

/** Return a status as its shape and its word. */
export function badge(status) {
  return h("span", { class: `badge ${status}` }, shape(status), status);
}
