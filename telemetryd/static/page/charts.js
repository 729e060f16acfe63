// Bars stacked by status over time, drawn for the width there is.

import { h, s } from "./dom.js";
import { count, short } from "./format.js";
import { go } from "./route.js";
import { BAD, STATUSES } from "./status.js";

const HEIGHT = 240;
const FOOT = 24;
const HEAD = 8;
const SIDE = 44;
const ROOM = 18; // half of what a label takes
const STEPS = [1, 2, 2.5, 5, 10];

/** Return round numbers from 0 to at least `most`, about four of them. */
export function ticks(most) {
  const rough = Math.max(most, 4) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = STEPS.map((factor) => factor * power).find((size) => size >= rough && Number.isInteger(size)) ?? 10 * power;
  const marks = [0];
  while (marks.at(-1) < most) marks.push(marks.at(-1) + step);
  return marks.length === 1 ? [0, step] : marks;
}

/** Return a square that looks as the bars of a status do. */
function swatch(status) {
  const look = status === "failure" ? { fill: "url(#hatch)" } : { class: `fill ${status}` };
  return s("svg", { class: "swatch", viewBox: "0 0 12 12", "aria-hidden": "true" }, s("rect", { width: 12, height: 12, rx: 3, ...look }));
}

const total = (bar) => STATUSES.reduce((sum, status) => sum + (bar.counts[status] ?? 0), 0);

function hatch() {
  const line = s("path", { d: "M-1 1l2-2M0 6l6-6M5 7l2-2", class: "hatch-line" });
  const pattern = s("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse" }, s("rect", { width: 6, height: 6, class: "fill failure" }), line);
  return s("defs", {}, pattern);
}

const REACH = 4; // so many pixels beyond a part still belong to it, for many parts are thin

/** Return the status whose part of a bar is at a height (px), failures before others; null outside all of them. */
function statusAt(parts, height) {
  const within = (reach) => parts.findLast(({ top, bottom }) => height >= top - reach && height <= bottom + reach);
  const bad = parts.findLast(({ status, top, bottom }) => BAD.includes(status) && bottom - top < 2 * REACH && height >= top - REACH && height <= bottom + REACH);
  return (bad ?? within(0) ?? within(REACH))?.status ?? null;
}

function draw(bars, width, tip) {
  const marks = ticks(Math.max(...bars.map(total)));
  const inner = HEIGHT - FOOT - HEAD;
  const y = (value) => HEAD + inner * (1 - value / marks.at(-1));
  const pitch = (width - SIDE) / bars.length;
  const gap = pitch > 12 ? 4 : 1;
  const picture = s("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" }, hatch());
  for (const mark of marks) {
    picture.append(
      s("line", { x1: SIDE, x2: width, y1: y(mark), y2: y(mark), class: mark ? "grid" : "axis" }),
      s("text", { x: SIDE - 8, y: y(mark) + 4, class: "tick", "text-anchor": "end" }, short(mark)),
    );
  }
  bars.forEach((bar, index) => {
    const x = SIDE + index * pitch;
    const group = s("g", { class: "bar-group" });
    const parts = [];
    let below = 0;
    for (const status of STATUSES) {
      const runs = bar.counts[status] ?? 0;
      if (!runs) continue;
      const top = y(below + runs);
      const height = Math.max(y(below) - top, 1);
      const fill = status === "failure" ? { fill: "url(#hatch)" } : { class: `fill ${status}` };
      group.append(s("rect", { x: x + gap / 2, y: top, width: Math.max(pitch - gap, 1), height, ...fill }));
      parts.push({ status, top, bottom: top + height });
      below += runs;
    }
    if (bar.label) group.append(s("text", { x: Math.min(x + pitch / 2, width - ROOM), y: HEIGHT - 6, class: "tick", "text-anchor": "middle" }, bar.label));
    const target = s("rect", { x, y: HEAD, width: pitch, height: inner, class: "target" });
    // Links within a picture would be stops for the keyboard that nobody announces; the table has them.
    const pointed = (event) => statusAt(parts, event.clientY - picture.getBoundingClientRect().top);
    target.addEventListener("click", (event) => go(bar.hrefOf(pointed(event))));
    target.addEventListener("pointermove", (event) => tip.show(bar, x + pitch / 2, pointed(event)));
    target.addEventListener("pointerleave", () => tip.hide());
    group.append(target);
    picture.append(group);
  });
  return picture;
}

function tooltip() {
  const element = h("div", { class: "tip", hidden: true });
  return {
    element,
    show(bar, x, pointed) {
      const lines = STATUSES.filter((status) => bar.counts[status]).reverse();
      element.replaceChildren(
        h("strong", {}, bar.title),
        ...lines.map((status) => h("span", { class: status === pointed ? "line pointed" : "line" }, swatch(status), h("span", {}, status), h("b", {}, count(bar.counts[status])))),
        h("span", { class: "quiet" }, !lines.length ? "no runs" : pointed ? `A click lists ${pointed} only` : "A click lists all"),
      );
      element.hidden = false;
      const most = element.parentElement.clientWidth - element.offsetWidth;
      element.style.left = `${Math.max(0, Math.min(x - element.offsetWidth / 2, most))}px`;
    },
    hide() {
      element.hidden = true;
    },
  };
}

function table(bars, statuses) {
  const head = h("tr", {}, h("th", { scope: "col" }, "Time"), statuses.map((status) => h("th", { scope: "col", class: "number" }, status)));
  const rows = bars.filter(total).map((bar) =>
    h("tr", {}, h("th", { scope: "row" }, h("a", { href: bar.hrefOf(null) }, bar.title)), statuses.map((status) => h("td", { class: "number" }, bar.counts[status] ? h("a", { href: bar.hrefOf(status) }, count(bar.counts[status])) : "0"))));
  return h("details", { class: "as-table" }, h("summary", {}, "Show as a table"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs as a table" }, h("table", {}, h("thead", {}, head), h("tbody", {}, rows))));
}

/** Return a legend of the statuses with how many runs each has. */
function legend(bars, statuses) {
  const sum = (status) => bars.reduce((runs, bar) => runs + (bar.counts[status] ?? 0), 0);
  return h("ul", { class: "legend" }, statuses.map((status) =>
    h("li", {}, swatch(status), status, h("b", {}, short(sum(status))))));
}

/**
 * Return stacked bars. Each bar has `counts` (by status), `title` (its time in full), `label` (below it, or "") and
 * `hrefOf`: what a click on the part of a status leads to, or (null) one outside all parts.
 */
export function stackedBars(bars, signal) {
  const used = STATUSES.filter((status) => bars.some((bar) => bar.counts[status]));
  const tip = tooltip();
  const bad = bars.reduce((sum, bar) => sum + BAD.reduce((part, status) => part + (bar.counts[status] ?? 0), 0), 0);
  const all = bars.reduce((sum, bar) => sum + total(bar), 0);
  const place = h("div", { class: "chart", role: "img", "aria-label": `${count(all)} runs over time, of which ${count(bad)} failed or timed out; the table below has the figures` });
  const frame = h("div", { class: "chart-frame" }, place, tip.element);
  const observer = new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > SIDE) place.replaceChildren(draw(bars, width, tip));
  });
  observer.observe(frame);
  signal.addEventListener("abort", () => observer.disconnect(), { once: true });
  return [legend(bars, used), frame, table(bars, used)];
}
