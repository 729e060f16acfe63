// The page of docs: this daemon's OpenAPI document, each operation with a form that sends it.

import { h, say } from "../../page/dom.js";
import "../../page/theme.js";
import { askForToken, asHeader, storedToken } from "../../page/token.js";
import { schemaView, typeOf } from "./schemas.js";
import { tryView } from "./trying.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

/** Ask with the token of this tab, if there is one, and ask for it where the daemon does. */
export async function ask(path, options = {}) {
  for (;;) {
    const token = storedToken();
    const headers = { ...options.headers, ...(token === null ? {} : { Authorization: asHeader(token) }) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    await askForToken(token);
  }
}

function parameters(spec, operation) {
  if (!operation.parameters?.length) return null;
  const lines = operation.parameters.map((parameter) =>
    h("tr", {},
      h("th", { scope: "row" }, h("code", {}, parameter.name), parameter.required ? h("span", { class: "required" }, " required") : null),
      h("td", { class: "quiet" }, parameter.in),
      h("td", {}, h("code", {}, typeOf(spec, parameter.schema))),
      h("td", {}, parameter.description ?? "")));
  return [h("h3", {}, "Parameters"), h("div", { class: "wide" }, h("table", {}, h("tbody", {}, lines)))];
}

function body(spec, operation) {
  const content = Object.entries(operation.requestBody?.content ?? {});
  if (!content.length) return null;
  return [h("h3", {}, "Body"), content.map(([type, { schema }]) => h("div", {}, h("p", { class: "quiet" }, type), schemaView(spec, schema)))];
}

function responses(spec, operation) {
  const lines = Object.entries(operation.responses).map(([status, response]) =>
    h("tr", {},
      h("th", { scope: "row" }, status),
      h("td", {}, response.description,
        Object.entries(response.content ?? {}).map(([type, { schema }]) => h("div", {}, h("span", { class: "quiet" }, type), schemaView(spec, schema))))));
  return [h("h3", {}, "Answers"), h("table", {}, h("tbody", {}, lines))];
}

function operationView(spec, path, method, operation) {
  const content = h("div", { class: "operation" });
  const id = operation.operationId;
  const details = h("details", { id, class: "panel", "data-words": `${method} ${path} ${operation.summary} ${(operation.parameters ?? []).map((one) => one.name).join(" ")}`.toLowerCase() },
    h("summary", {}, h("span", { class: `method ${method}` }, method.toUpperCase()), h("code", { class: "path" }, path), h("span", { class: "quiet" }, operation.summary)),
    content);
  details.addEventListener("toggle", () => {
    if (!details.open || content.hasChildNodes()) return; // what nobody opens is never built
    const scope = operation["x-required-scope"];
    const parts = [
      h("p", {}, operation.description ?? ""),
      scope ? h("p", { class: "quiet" }, "Needs the scope ", h("code", {}, scope), " where authentication is on.") : null,
      parameters(spec, operation), body(spec, operation), responses(spec, operation), tryView(ask, path, method, operation),
    ];
    content.append(...parts.flat(Infinity).filter(Boolean));
    history.replaceState(null, "", `#${id}`);
  });
  return details;
}

function sections(spec) {
  return spec.tags.map((tag) => {
    const operations = Object.entries(spec.paths).flatMap(([path, item]) =>
      METHODS.filter((method) => item[method]?.tags.includes(tag.name)).map((method) => operationView(spec, path, method, item[method])));
    return h("section", { class: "stack" }, h("h2", {}, tag.name), h("p", { class: "quiet" }, tag.description), operations);
  });
}

function find(words) {
  let found = 0;
  for (const details of document.querySelectorAll("details[data-words]")) {
    details.hidden = !words.toLowerCase().split(/\s+/).every((word) => details.dataset.words.includes(word));
    found += details.hidden ? 0 : 1;
  }
  for (const section of document.querySelectorAll("section")) section.hidden = !section.querySelector("details[data-words]:not([hidden])");
  say(`${found} operations`);
}

function openNamed() {
  const details = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (details instanceof HTMLDetailsElement) {
    details.open = true;
    details.scrollIntoView();
  }
}

async function show() {
  const answer = await ask("openapi.json");
  if (!answer.ok) {
    document.getElementById("about").textContent = `The document cannot be read: ${answer.status}`;
    return;
  }
  const spec = await answer.json();
  document.getElementById("version").textContent = spec.info.version;
  document.getElementById("about").textContent = spec.info.description;
  document.getElementById("operations").append(...sections(spec));
  document.getElementById("find").addEventListener("input", (event) => find(event.target.value));
  addEventListener("hashchange", openNamed);
  openNamed();
}

show();
