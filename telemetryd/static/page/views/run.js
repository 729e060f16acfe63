// One run: how it went, what it says of itself, its errors, its events, and the runs around it.

import { address, get, page, runPath } from "../api.js";
import { h, outside } from "../dom.js";
import { eventsPanel } from "../events.js";
import { MINUTE, ago, count, counted, duration, fullTime, isAhead, now } from "../format.js";
import { IN_LISTS, copyButton, every, fillLater, panel, problem, sentence, summaryOf, took, when } from "../parts.js";
import { exact, href, runHref } from "../route.js";
import { badge, shape } from "../status.js";
import { anyValue, firstEntries, longText } from "../texts.js";

const REFRESH_MS = 3000;
const CHILDREN = 100;
const ANCESTORS = 5;
const QUIET_MS = 5 * MINUTE;

export const title = (name) => `Run ${name}`;

function facts(pairs, otherwise = sentence("Nothing was reported.")) {
  const given = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false);
  return given.length ? h("dl", { class: "facts" }, given.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))) : otherwise;
}

const number = (any) => (Number.isInteger(any) ? count(any) : String(any));

const moment = (text) => (text ? [fullTime(text), " ", h("span", { class: "quiet" }, "(", when(text), ")")] : null);

function age(run) {
  const silent = now() - Date.parse(run.updated_at);
  const isQuiet = silent > QUIET_MS;
  const ran = isAhead(run.start_time) ? "Running." : `Running for ${duration(Math.max(0, now() - Date.parse(run.start_time)))}.`;
  return h("p", { class: isQuiet ? "note warn" : "note" },
    `${ran} Last heard of ${ago(run.updated_at)}`,
    isQuiet ? ": no heartbeat, no event and no change since." : ".",
    run.expected_by && Date.parse(run.expected_by) < now() && [" It should have ended ", when(run.expected_by), "."]);
}

/** Return a run's labels, each of which leads to the runs that have it. */
function labels(run) {
  if (!run.labels) return null;
  return h("span", { class: "chips" }, Object.entries(run.labels).map(([name, value]) => h("a", { class: "chip", href: href("runs", { [`label.${name}`]: exact(value) }) }, `${name}=${value}`)));
}

const MOMENTS = [["created", "created_at"], ["started", "start_time"], ["ended", "end_time"]];

/** Say which of a run's times are still to come: somebody's clock is, or was, wrong. */
function future(run) {
  const ahead = MOMENTS.filter(([, field]) => run[field] && isAhead(run[field]));
  if (!ahead.length) return null;
  return h("p", { class: "note warn future-note" }, "This run is dated in the future: ", ahead.map(([word, field], index) => [index ? ", " : "", word, " ", when(run[field]), ` (${fullTime(run[field])})`]), ". The clock of the machine that reported it was wrong, or the daemon's is.");
}

function items(run) {
  const parts = [["success", "done", run.items_succeeded], ["failure", "failed", run.items_failed], ["cancelled", "skipped", run.items_skipped]];
  const handled = parts.reduce((sum, [, , number]) => sum + number, 0);
  const all = Math.max(run.items_discovered, handled);
  if (!all) return null;
  const given = parts.filter(([, , number]) => number);
  const segments = given.map(([kind, , number]) => {
    const part = h("span", { class: `part ${kind}` });
    part.style.flexGrow = number;
    return part;
  });
  const rest = all > handled && h("span", { class: "part" });
  if (rest) rest.style.flexGrow = all - handled;
  return h("div", { class: "item-bar" },
    h("p", {}, h("b", {}, counted(all, "item")), given.map(([kind, name, number]) => h("span", { class: `key ${kind}` }, shape(kind), `${count(number)} ${name}`))),
    h("div", { class: "progress", "aria-hidden": "true" }, segments, rest));
}

function errors(run) {
  if (!run.error_summary && !run.error_details) return null;
  const text = [run.error_summary, run.error_details].filter(Boolean).join("\n\n");
  return h("section", { class: `panel error-panel ${run.status}` },
    h("header", {}, h("h2", {}, "What went wrong"), copyButton(text, "the error")),
    h("div", { class: "body" }, run.error_summary && h("p", { class: "headline" }, longText(run.error_summary, { part: 1000 })), run.error_details && h("pre", { tabindex: "0", role: "region", "aria-label": "Error in full" }, longText(run.error_details, { part: 8000, ends: true }))));
}

function commit(run) {
  const hash = run.git_commit_hash;
  const shown = hash && h("code", {}, hash.slice(0, 12));
  return facts([
    ["Repository", run.git_repo && outside(run.repo_url, run.git_repo)],
    ["Branch", run.git_branch],
    ["Commit", hash && [run.commit_url ? outside(run.commit_url, shown) : shown, " ", copyButton(hash, "the commit")]],
    ["Its runs", hash && h("a", { href: href("runs", { git_commit_hash: exact(hash) }) }, "Runs of this commit")],
    ["Made by", run.git_commit_source && `${run.git_commit_source}${run.git_commit_author ? `, ${run.git_commit_author}` : ""}`],
    ["Committed", moment(run.git_commit_timestamp)],
    ["Tag", run.git_run_tag],
  ]);
}

function sections(run) {
  const bar = items(run);
  const own = (object) => h("dl", { class: "facts" }, firstEntries(object, (name, any) => h("div", {}, h("dt", {}, longText(name, { part: 200 })), h("dd", {}, anyValue(any, number)))));
  const text = (any) => any && longText(any);
  return h("div", { class: "columns" },
    panel("What it did", h("div", { class: "body" }, bar, facts([
      ["Input", text(run.input_summary)], ["Output", text(run.output_summary)], ["Item", text(run.item_name)], ["From", text(run.source_ref)], ["To", text(run.target_ref)],
      ["Product", [run.product, run.product_family].filter(Boolean).join(" · ")], ["Website", [run.website, run.subdomain, run.website_section].filter(Boolean).join(" · ")], ["Platform", run.platform], ["Insight", run.insight_id],
    ], bar ? null : undefined))),
    panel("Where and when", h("div", { class: "body" }, facts([
      ["Labels", labels(run)],
      ["Started", moment(run.start_time)], ["Expected by", moment(run.expected_by)], ["Ended", moment(run.end_time)], ["Last change", moment(run.updated_at)],
      ["Host", run.host && h("a", { href: href("runs", { host: exact(run.host) }) }, run.host)],
      ["Environment", run.environment && h("a", { href: href("runs", { environment: exact(run.environment) }) }, run.environment)],
      ["Trigger", run.trigger_type],
      ["Attempt", run.attempt && count(run.attempt)], ["Tries again", run.retry_of && h("a", { href: runHref(run.retry_of) }, run.retry_of)],
      ["Conversation", run.conversation_id && h("a", { href: href("runs", { conversation_id: exact(run.conversation_id) }) }, run.conversation_id)],
      ["Trace", run.trace_id && [h("a", { href: href("runs", { trace_id: run.trace_id }) }, h("code", {}, run.trace_id)), run.span_id && [" span ", h("code", {}, run.span_id)]]],
    ]))),
    (run.git_repo || run.git_commit_hash) && panel("Commit", h("div", { class: "body" }, commit(run))),
    (run.metrics_json || run.context_json) && h("div", { class: "stack" },
      run.metrics_json && panel("Its figures", h("div", { class: "body" }, own(run.metrics_json))),
      run.context_json && panel("Its context", h("div", { class: "body" }, own(run.context_json)))));
}

function node(run, isThis, below) {
  const content = [badge(run.status), h("span", { class: "name" }, run.agent_name), h("span", { class: "quiet what" }, summaryOf(run) || run.job_type), h("span", { class: "quiet" }, took(run) ?? "")];
  return h("li", { class: isThis ? "this" : null }, isThis ? h("div", { class: "node", "aria-current": "true" }, content) : h("a", { class: "node", href: runHref(run.event_id), "data-item": true }, content), below);
}

async function family(run, signal) {
  const find = async (parameters) => (await page(address("api/v1/runs", { ...parameters, fields: IN_LISTS }), signal)).items;
  const ancestors = [];
  let above = run.parent_run_id;
  while (above && ancestors.length < ANCESTORS) {
    const [parent] = await find({ run_id: exact(above), limit: 1 });
    if (parent === undefined || ancestors.some(({ run_id }) => run_id === parent.run_id)) break;
    ancestors.unshift(parent);
    above = parent.parent_run_id;
  }
  const [children, siblings] = await Promise.all([
    find({ parent_run_id: exact(run.run_id), limit: CHILDREN }),
    run.parent_run_id ? find({ parent_run_id: exact(run.parent_run_id), limit: CHILDREN }) : [run],
  ]);
  if (!ancestors.length && !children.length && siblings.length < 2) return sentence("It started no other run, and none started it.");
  const below = children.length ? h("ul", {}, children.reverse().map((child) => node(child, false))) : null;
  const known = siblings.some(({ event_id }) => event_id === run.event_id) ? siblings : [run, ...siblings];
  const own = known.reverse().map((sibling) => node(sibling, sibling.event_id === run.event_id, sibling.event_id === run.event_id ? below : null));
  const cut = [children.length === CHILDREN && run.run_id, siblings.length === CHILDREN && run.parent_run_id].filter(Boolean);
  return [h("ul", { class: "tree" }, ancestors.reduceRight((inner, parent) => node(parent, false, h("ul", {}, inner)), own)), ...cut.map((parent) => h("p", { class: "quiet" }, `The last ${CHILDREN} are shown. `, h("a", { href: href("runs", { parent_run_id: exact(parent) }) }, parent === run.run_id ? "All runs that it started" : "All runs that its parent started")))];
}

function everything(run) {
  const body = h("tbody", {});
  const element = h("details", { class: "panel everything", on: { toggle: fill } }, h("summary", {}, "All fields"), h("div", { class: "body scroll", tabindex: "0", role: "region", "aria-label": "All fields" }, h("table", {}, body)));
  function fill() { // only if somebody wants to see them
    if (!element.open || body.firstChild) return;
    body.append(...Object.entries(run).map(([name, any]) =>
      h("tr", {}, h("th", { scope: "row" }, h("code", {}, name)), h("td", {}, any === null ? h("span", { class: "quiet" }, "null") : anyValue(any)))));
  }
  return element;
}

export function show(root, { name, parameters, signal }) {
  const top = h("div", { class: "stack" }, h("h1", {}, "Run"));
  const lived = h("div", {});
  const events = eventsPanel(name, parameters, signal);
  const relatives = h("div", { class: "body" }, sentence("Asking …"));
  const bottom = h("div", {});
  let seen = null;

  function draw(run) {
    top.replaceChildren(...[
      h("div", { class: "run-head" },
        h("p", { class: "quiet crumbs" }, h("a", { href: "#/runs" }, "Runs"), " / ", h("a", { href: href("runs", { agent_name: exact(run.agent_name) }) }, run.agent_name)),
        h("div", { class: "view-head" }, h("h1", {}, run.job_type), badge(run.status), took(run) && h("span", { class: "took" }, took(run))),
        h("p", { class: "quiet ids" }, h("code", {}, run.event_id), copyButton(run.event_id, "the event_id"), h("span", {}, "run ", h("code", {}, run.run_id)), h("span", {}, "created ", when(run.created_at)))),
      future(run),
      lived,
      errors(run),
      sections(run),
    ].filter(Boolean));
    if (bottom.contains(document.activeElement)) return;
    const wasOpen = bottom.querySelector("details")?.open;
    bottom.replaceChildren(everything(run));
    bottom.querySelector("details").open = Boolean(wasOpen);
  }

  async function load() {
    const run = await get(runPath(name), {}, signal);
    lived.replaceChildren(run.status === "running" ? age(run) : "");
    if (seen?.updated_at !== run.updated_at) {
      if (!top.contains(document.activeElement) || seen === null) draw(run); // the reader who has the focus there is not disturbed
      events.show(run);
      fillLater(relatives, signal, () => family(run, signal));
    }
    seen = run;
  }

  root.append(top, events.whole, panel("Family", relatives, { note: "the run that started it, and those it started" }), bottom);
  load().catch((error) => {
    if (signal.aborted) return;
    root.replaceChildren(h("h1", {}, error.status === 404 ? "There is no such run" : "This run cannot be shown"), problem(error.message), h("p", {}, h("a", { href: "#/runs" }, "All runs")));
  });
  every(REFRESH_MS, signal, () => seen?.status === "running" && load().catch(() => {})); // the next look may succeed
  return events.change;
}
