// The overview: what the agents did lately, who fails, who is slow, and how the daemon is.

import { alertsPanel } from "../alerts.js";
import { address, get, page } from "../api.js";
import { stackedBars } from "../charts.js";
import { h } from "../dom.js";
import { DAY, HOUR, ZONE, bytes, count, counted, dayOf, duration, now, percent, short, timeOf } from "../format.js";
import { onHealth } from "../health.js";
import { IN_LISTS, choice, every, fillLater, panel, sentence, summaryOf, when } from "../parts.js";
import { regressionsPanel } from "../regressions.js";
import { buckets, filtersOf, lastNight, midnight, rangeFields, rangeText, spans, within } from "../range.js";
import { doubt, share } from "../rates.js";
import { exact, go, href, runHref } from "../route.js";
import { BAD, badge } from "../status.js";

const PERIODS = { "24h": { hours: 24, name: "Last 24 hours" }, "7d": { hours: 7 * 24, name: "Last 7 days" } };
const LABELS = 8; // so many have room below the bars
const REFRESH_MS = 30_000;
const SHOWN = 6;
const FEW = 20; // of fewer runs 95 % are all

export const title = () => "Overview";

const iso = (ms) => new Date(ms).toISOString();

const floor = (ms) => Math.floor(ms / HOUR) * HOUR;
const ceil = (ms) => Math.ceil(ms / HOUR) * HOUR;

/** Return the time that an address asks for, in whole hours: its beginning and end (ms), its name, and whether it is one of the reader's own. */
function periodOf(parameters) {
  const [from, to] = [Date.parse(parameters.from ?? ""), Date.parse(parameters.to ?? "")];
  if (Number.isNaN(from) && Number.isNaN(to)) {
    const key = Object.hasOwn(PERIODS, parameters.period ?? "") ? parameters.period : "24h";
    const { hours, name } = PERIODS[key];
    const end = floor(now()) + HOUR;
    return { key, name, from: end - hours * HOUR, to: end, isOwn: false };
  }
  const end = ceil(Number.isNaN(to) ? Math.max(now(), from + HOUR) : to);
  const begin = floor(Number.isNaN(from) ? end - DAY : from);
  return { key: "own", name: rangeText(begin, end), from: begin, to: Math.max(end, begin + HOUR), isOwn: true };
}

/** Ask for the runs by hours or by days, whichever a period is shown in; answer its groups by status. */
async function byTime(period, signal) {
  const parts = buckets(period.from, period.to);
  const isByDays = parts.some(([from, to]) => to - from > HOUR);
  const asked = isByDays ? spans(period.from, period.to) : [{ bucket: "1h", from: iso(period.from), to: iso(period.to) }];
  const answers = await Promise.all(asked.map((span) => get("api/v1/stats", { group_by: "status", ...span }, signal)));
  const groups = answers.flatMap((answer) => answer.groups);
  return { groups, parts, isByDays };
}

function bars({ groups, parts, isByDays }) {
  const keyOf = isByDays ? midnight : (ms) => ms;
  const counts = new Map(parts.map(([from]) => [keyOf(from), {}]));
  for (const group of groups) {
    const own = counts.get(keyOf(Date.parse(group.bucket)));
    own[group.status] = (own[group.status] ?? 0) + group.runs;
  }
  const hours = [1, 2, 4, 24].find((step) => parts.length / step <= LABELS) ?? DAY / HOUR;
  const isLabelled = isByDays ? (from, index) => index % Math.ceil(parts.length / LABELS) === 0 : (from) => new Date(from).getHours() % hours === 0;
  return parts.map(([from, to], index) => ({
    counts: counts.get(keyOf(from)),
    title: isByDays && to - from > 22 * HOUR ? dayOf(from + HOUR) : rangeText(from, to),
    label: !isLabelled(from, index) ? "" : isByDays || hours === 24 ? dayOf(from + HOUR) : timeOf(from),
    hrefOf: (status) => href("runs", { ...within(from, to), status }),
  }));
}

function tile(name, value, note, kind = "") {
  return h("div", { class: `tile ${kind}` }, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "quiet" }, note));
}

/** Return how often something happened; where it is less than once an hour, within which time. */
function rate(number, ms) {
  const hours = ms / HOUR;
  if (number < hours) return `in ${hours % 24 ? counted(hours, "hour") : counted(hours / 24, "day")}`;
  const each = number / hours;
  return `${each < 10 ? Number(each.toFixed(1)) : short(Math.round(each))} per hour`;
}

/** Return the tile of the success rate, which says so where the runs are too few to be sure of it. */
function successTile(succeeded, finished, all) {
  if (!finished) return tile("Success rate", "no data", all ? "no run has finished" : "no runs");
  const open = doubt(succeeded, finished);
  return tile("Success rate", percent(succeeded / finished), `${short(succeeded)} of ${short(finished)} finished${open === null ? "" : ` (95 % interval ${open})`}`);
}

function tiles(groups, agents, period) {
  const range = within(period.from, period.to);
  const sum = (statuses) => groups.filter((group) => statuses.includes(group.status)).reduce((runs, group) => runs + group.runs, 0);
  const all = groups.reduce((runs, group) => runs + group.runs, 0);
  const [running, succeeded, failed, timedOut] = [["running"], ["success"], ["failure"], ["timeout"]].map(sum);
  const finished = all - running;
  return h(
    "dl",
    { class: "tiles" },
    tile("Runs", short(all), `by ${counted(agents.length, "agent")}, ${rate(all, period.to - period.from)}`),
    successTile(succeeded, finished, all),
    tile("Failed", h("a", { href: href("runs", { status: BAD.join(","), ...range }) }, short(failed + timedOut)), `${short(failed)} failures, ${counted(timedOut, "timeout")}`, failed + timedOut ? "bad" : ""),
    tile("Still running", h("a", { href: href("runs", { status: "running", ...range }) }, short(running)), "started in this period"),
  );
}

/** Return a line whose length shows a share of the largest; the figure itself stands next to it. */
function track(share, kind) {
  const part = h("span", { class: kind });
  part.style.width = `${100 * share}%`;
  return h("span", { class: "track", "aria-hidden": "true" }, part);
}

function ranking(rows, of, most) {
  if (!rows.length) return sentence("Nobody.");
  return h("ol", { class: "ranking" }, rows.map((row) =>
    h("li", {}, h("a", { href: of.href(row), "data-item": true }, h("span", { class: "name" }, row.agent_name), h("span", { class: "quiet" }, of.note(row)), h("b", {}, of.value(row)), track(of.size(row) / most, of.kind)))));
}

function failing(bad, agents, range) {
  const all = new Map(agents.map((group) => [group.agent_name, group.finished]));
  const finished = (row) => Math.max(all.get(row.agent_name) ?? 0, row.runs); // one answer may be newer than the other
  const rows = bad.filter((group) => group.runs).sort((a, b) => b.runs - a.runs).slice(0, SHOWN);
  return ranking(rows, {
    href: (row) => href("runs", { agent_name: exact(row.agent_name), status: BAD.join(","), ...range }),
    note: (row) => `${share(row.runs, finished(row))} of ${counted(finished(row), "run")}`,
    value: (row) => count(row.runs),
    size: (row) => row.runs,
    kind: "bad",
  }, rows[0]?.runs);
}

function slowest(groups, range) {
  const rows = groups.filter((group) => group.duration_ms?.p95 > 0).sort((a, b) => b.duration_ms.p95 - a.duration_ms.p95).slice(0, SHOWN);
  return ranking(rows, {
    href: (row) => href("runs", { agent_name: exact(row.agent_name), ...range }),
    note: (row) => `half ${row.finished < FEW ? `of ${counted(row.finished, "run")} ` : ""}within ${duration(row.duration_ms.p50)}`,
    value: (row) => duration(row.duration_ms.p95),
    size: (row) => row.duration_ms.p95,
    kind: "slow",
  }, rows[0]?.duration_ms.p95);
}

function failures(runs) {
  if (!runs.length) return sentence("No run has failed.");
  return h("ul", { class: "lines" }, runs.map((run) =>
    h("li", {}, h("a", { href: runHref(run.event_id), "data-item": true }, badge(run.status), h("span", { class: "name" }, run.agent_name), h("span", { class: "quiet what" }, summaryOf(run) || run.job_type), when(run.created_at)))));
}

function daemon(health, metrics) {
  const facts = [
    ["Writes", health.status === "ok" ? "taken" : health.detail],
    ["Queue", health.queue_depth === 0 ? "empty" : `${counted(health.queue_depth, "command")}, the oldest for ${duration(health.oldest_waiting_s * 1000)}`],
    ["Last commit", when(health.last_commit_at)],
    ["A write survives", health.durable ? "a crash and a power cut" : "a crash, not a power cut"],
    ["Journal", `${health.journal_mode}, synchronous ${health.synchronous}`],
    ["Write-ahead log", bytes(health.wal_bytes)],
    ["Free on disk", bytes(health.disk_free_bytes)],
    ["Runs stored", metrics && `${count(metrics.total_runs)} by ${counted(Object.keys(metrics.agents).length, "agent")}`],
    ["Version", health.version],
  ];
  return h("dl", { class: "facts" }, facts.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function daemonPanel(signal) {
  const place = h("div", { class: "body" }, sentence("Asking …"));
  let metrics = null;
  let health = null;
  const draw = () => place.replaceChildren(health.version ? daemon(health, metrics) : sentence(health.detail));
  onHealth((latest) => { health = latest; draw(); }, signal);
  get("metrics", {}, signal).then((answer) => { metrics = answer; if (health) draw(); }, () => {}); // health says why
  return panel("The daemon", place);
}

export function show(root, { parameters, signal }) {
  const heading = h("h1", {});
  const picker = h("div", {});
  const own = rangeFields((given) => go(href("overview", given), true));
  const begun = h("p", { class: "quiet" });
  const figures = h("div", { class: "figures" });
  const chart = h("div", { class: "body chart-body" });
  const worst = h("div", { class: "body" });
  const slow = h("div", { class: "body" });
  const latest = h("div", { class: "body" });
  const alerts = alertsPanel(signal);
  const charted = panel("Runs per hour", chart);
  let asked = {};
  let loading = new AbortController();
  signal.addEventListener("abort", () => loading.abort(), { once: true });

  function load() {
    loading.abort(); // what was asked before must not come after this
    loading = new AbortController();
    const { signal } = loading;
    const period = periodOf(asked);
    const range = within(period.from, period.to);
    const ask = (parameters) => get("api/v1/stats", { from: iso(period.from), to: iso(period.to), ...parameters }, signal).then((answer) => answer.groups);
    const inTime = byTime(period, signal);
    const byAgent = ask({ group_by: "agent_name" });
    heading.textContent = period.name;
    begun.textContent = period.isOwn ? `whole hours, ${ZONE} time` : `whole hours since ${dayOf(period.from)}, ${timeOf(period.from)}, ${ZONE} time`;
    fillLater(figures, signal, async () => {
      const [{ groups }, agents] = await Promise.all([inTime, byAgent]);
      return tiles(groups, agents, period);
    });
    fillLater(chart, signal, async () => {
      const found = await inTime;
      charted.querySelector("h2").textContent = found.isByDays ? "Runs per day" : "Runs per hour";
      return found.groups.length ? stackedBars(bars(found), signal) : sentence("No run in this time. telemetryd demo posts some.");
    });
    fillLater(slow, signal, async () => slowest(await byAgent, range));
    fillLater(worst, signal, async () => failing(await ask({ group_by: "agent_name", status: BAD.join(",") }), await byAgent, range));
    fillLater(latest, signal, async () => {
      const found = await page(address("api/v1/runs", { status: BAD.join(","), limit: SHOWN + 2, fields: IN_LISTS, ...(period.isOwn ? filtersOf(range) : {}) }), signal);
      return failures(found.items);
    });
  }

  function change(next) {
    asked = next;
    const { key, from, to, isOwn } = periodOf(next);
    const night = lastNight(now());
    const isNight = isOwn && from === night.from && to === night.to;
    picker.replaceChildren(choice("Period", [
      ...Object.keys(PERIODS).map((name) => [name, name, href("overview", name === "24h" ? {} : { period: name })]),
      ["night", "Last night, 22–06", href("overview", within(night.from, night.to))],
      ["own", "From … to …", href("overview", within(from, to))],
    ], isNight ? "night" : key));
    own.element.hidden = !isOwn;
    own.set(isOwn ? { from: iso(from), to: iso(to), ...next } : {});
    load();
  }

  root.append(
    h("div", { class: "view-head" }, heading, picker, begun),
    own.element,
    figures,
    alerts.whole,
    charted,
    regressionsPanel(signal),
    h("div", { class: "columns" }, panel("Most failures", worst), panel("Slowest agents", slow, { note: "95 % end within" })),
    h("div", { class: "columns wide-left" }, panel("Latest failures", latest, { tools: h("a", { href: href("runs", { status: BAD.join(",") }) }, "All", h("span", { class: "unseen" }, " failures")) }), daemonPanel(signal)),
  );
  change(parameters);
  alerts.load();
  every(REFRESH_MS, signal, () => { load(); alerts.load(); });
  return change;
}
