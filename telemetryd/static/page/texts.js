// Long texts and large objects: a part is shown until somebody asks for all, and even then only what is in view is laid out.

import { h, visible } from "./dom.js";
import { count } from "./format.js";

const PART = 800;
const BLOCK = 20_000;
const ENTRIES = 24;

const isHigh = (code) => code >= 0xd800 && code < 0xdc00;

/** Return the beginning of a text, never half of a character. */
const start = (text, length) => text.slice(0, isHigh(text.charCodeAt(length - 1)) ? length - 1 : length);

/** Return a whole text in blocks; style sheets let the browser pass over those out of view. */
function blocks(text) {
  const made = [];
  for (let at = 0; at < text.length;) {
    const line = text.lastIndexOf("\n", at + BLOCK);
    const isEnd = at + BLOCK >= text.length;
    const end = isEnd ? text.length : line > at ? line : at + start(text.slice(at, at + BLOCK), BLOCK).length;
    made.push(h("span", { class: "block" }, text.slice(at, end)));
    at = text[end] === "\n" ? end + 1 : end;
  }
  return made;
}

/** Return a button that puts all of a text, which `make` returns, in the place of what an element shows. */
function showAll(element, make, size) {
  function show() {
    const all = h("span", { class: "whole", tabindex: "0" }, blocks(make()));
    element.replaceChildren(all);
    all.focus({ preventScroll: true }); // who reads it is not disturbed by what comes
  }
  return h("button", { type: "button", class: "button small", on: { click: show } }, `Show all (${size})`);
}

/** Return a text, or if it is long its beginning (with `ends` its end as well) and a button that shows all of it. */
export function longText(text, { part = PART, ends = false } = {}) {
  if (text.length <= part) return text;
  const element = h("span", { class: "long" });
  const head = start(text, ends ? part / 2 : part);
  const tail = ends ? text.slice(-part / 2) : "";
  const left = `… ${count(text.length - head.length - tail.length)} characters left out `;
  element.append(...visible(head), h("span", { class: "left-out" }, left, showAll(element, () => text, `${count(text.length)} characters`)), ...visible(tail));
  return element;
}

/** Return JSON in one line, at most so long, without looking at more of a value than that; and whether it is cut. */
export function brief(value, room = 300) {
  const parts = [];
  let left = room;
  const put = (text) => {
    if (left > 0) parts.push(start(text, left));
    left -= text.length;
  };
  function walk(any) {
    if (typeof any !== "object" || any === null) {
      put(JSON.stringify(typeof any === "string" ? any.slice(0, left + 1) : any));
      return;
    }
    const isList = Array.isArray(any);
    let isFirst = true;
    put(isList ? "[" : "{");
    for (const key in any) {
      if (left <= 0) return;
      put(`${isFirst ? "" : ","}${isList ? "" : `${JSON.stringify(key)}:`}`);
      isFirst = false;
      walk(any[key]);
    }
    put(isList ? "]" : "}");
  }
  if (typeof value === "string") put(value);
  else walk(value);
  return { text: parts.join(""), isCut: left < 0 };
}

/** Return any value of a run's JSON. */
export function anyValue(any, show = String) {
  if (typeof any === "string") return longText(any);
  if (typeof any !== "object" || any === null) return show(any);
  if (!brief(any, PART).isCut) return h("pre", {}, JSON.stringify(any, null, 2));
  return cutObject(any, PART, "pre");
}

function cutObject(any, room, tag) {
  const element = h(tag, { class: "long" });
  element.append(...visible(brief(any, room).text), h("span", { class: "left-out" }, "… ", showAll(element, () => JSON.stringify(any, null, 2), "as JSON")));
  return element;
}

/** Return the first pairs of an object, drawn by `draw`, and a button that shows the object if it has more. */
export function firstEntries(object, draw, most = ENTRIES) {
  const names = Object.keys(object);
  const drawn = names.slice(0, most).map((name) => draw(name, object[name]));
  if (names.length <= most) return drawn;
  const element = h("div", { class: "long" });
  element.append(`… ${count(names.length - most)} more `, showAll(element, () => JSON.stringify(object, null, 2), "as JSON"));
  return [...drawn, element];
}

/** Return what an event brought along: in short, with a button that shows it all if that is not all. */
export function payload(object) {
  const element = h("span", { class: "quiet payload" });
  const names = Object.keys(object);
  let isCut = names.length > 12;
  for (const name of names.slice(0, 12)) {
    const shown = brief(object[name]);
    isCut ||= shown.isCut || name.length > 100;
    element.append(h("span", {}, `${start(name, 100)} `, h("code", {}, shown.text, shown.isCut ? "…" : "")));
  }
  if (isCut) element.append(showAll(element, () => JSON.stringify(object, null, 2), names.length > 12 ? `${count(names.length)} values` : "as JSON"));
  return element;
}
