// Brings the view that the address names onto the page, and takes it away when the address changes.

import { h, plain } from "./dom.js";
import { ZONE } from "./format.js";
import { watchHealth } from "./health.js";
import { listen, stepWith } from "./keyboard.js";
import { parse } from "./route.js";
import * as agents from "./views/agents.js";
import * as overview from "./views/overview.js";
import * as run from "./views/run.js";
import * as runs from "./views/runs.js";
import * as stale from "./views/stale.js";

const VIEWS = new Map(Object.entries({ overview, runs, run, agents, stale }));
const main = document.getElementById("main");
let shown = { view: null, name: null, leave: new AbortController(), change: null };

function showRoute() {
  const { view, name, parameters } = parse(location.hash);
  if (view === shown.view && name === shown.name && shown.change) {
    shown.change(parameters);
    return;
  }
  const isFirst = shown.view === null;
  shown.leave.abort();
  stepWith(null);
  const leave = new AbortController();
  shown = { view, name, leave, change: null };
  main.replaceChildren();
  main.className = `view ${view}`;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const known = VIEWS.get(view);
  document.title = plain(`${known ? known.title(name) : "Not found"} · telemetryd`);
  if (known) shown.change = known.show(main, { name, parameters, signal: leave.signal }) ?? null;
  else main.append(h("h1", {}, "There is no such view"), h("p", {}, h("a", { href: "#/" }, "Go to the overview")));
  if (!isFirst) {
    scrollTo(0, 0);
    if (!main.contains(document.activeElement)) main.focus({ preventScroll: true });
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address holds the view
  main.focus();
});
addEventListener("hashchange", showRoute);
document.getElementById("zone").textContent = `Times are local: ${ZONE}`;
listen();
watchHealth();
showRoute();
