// The overview: what the agents did lately, who fails, who is slow, and how the daemon is.

import { alertsPanel } from "../alerts.js";
import { get, page } from "../api.js";
import { stackedBars } from "../charts.js";
import { h } from "../dom.js";
import { DAY, HOUR, bytes, count, counted, dayOf, duration, percent, short, timeOf } from "../format.js";
import { onHealth } from "../health.js";
import { IN_LISTS, choice, every, fillLater, panel, sentence, summaryOf, when } from "../parts.js";
import { regressionsPanel } from "../regressions.js";
import { exact, href, runHref } from "../route.js";
import { BAD, badge } from "../status.js";

const PERIODS = { "24h": { hours: 24, name: "Last 24 hours", label: 4 }, "7d": { hours: 7 * 24, name: "Last 7 days", label: 24 } };
const REFRESH_MS = 30_000;
const SHOWN = 6;

export const title = () => "Overview";

/** Return the start of the first of the hours that a period shows, in ms. */
const beginning = (period, now) => Math.floor(now / HOUR) * HOUR - (period.hours - 1) * HOUR;

const iso = (ms) => new Date(ms).toISOString();
/** Return the parameters of the runs created from a moment on, for so long. */
const within = (ms, length) => ({ created_after: iso(ms - 1).replace("Z", "999Z"), created_before: iso(ms + length) });

function bars(groups, from, period, now) {
  const byHour = new Map();
  for (const group of groups) {
    const hour = Date.parse(group.bucket);
    byHour.set(hour, { ...byHour.get(hour), [group.status]: group.runs });
  }
  const made = [];
  for (let hour = from; hour <= now; hour += HOUR) {
    const start = new Date(hour);
    const isLabelled = period.label === 24 ? start.getHours() === 0 : start.getHours() % period.label === 0;
    made.push({
      counts: byHour.get(hour) ?? {},
      title: `${dayOf(start)}, ${timeOf(start)} – ${timeOf(new Date(hour + HOUR))}`,
      label: isLabelled ? (period.label === 24 ? dayOf(start) : timeOf(start)) : "",
      href: href("runs", within(hour, HOUR)),
    });
  }
  return made;
}

function tile(name, value, note, kind = "") {
  return h("div", { class: `tile ${kind}` }, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "quiet" }, note));
}

function tiles(groups, agents, period, since) {
  const sum = (statuses) => groups.filter((group) => statuses.includes(group.status)).reduce((runs, group) => runs + group.runs, 0);
  const all = groups.reduce((runs, group) => runs + group.runs, 0);
  const [running, succeeded, failed, timedOut] = [["running"], ["success"], ["failure"], ["timeout"]].map(sum);
  const finished = all - running;
  return h(
    "dl",
    { class: "tiles" },
    tile("Runs", short(all), `by ${counted(agents.length, "agent")}, ${short(Math.round(all / period.hours))} per hour`),
    tile("Success rate", percent(finished ? succeeded / finished : null), `${short(succeeded)} of ${short(finished)} finished`),
    tile("Failed", h("a", { href: href("runs", { status: BAD.join(","), created_after: since }) }, short(failed + timedOut)), `${short(failed)} failures, ${counted(timedOut, "timeout")}`, failed + timedOut ? "bad" : ""),
    tile("Still running", h("a", { href: href("runs", { status: "running", created_after: since }) }, short(running)), "begun in this time"),
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

function failing(bad, agents, since) {
  const all = new Map(agents.map((group) => [group.agent_name, group.runs]));
  const rows = bad.filter((group) => group.runs).sort((a, b) => b.runs - a.runs).slice(0, SHOWN);
  return ranking(rows, {
    href: (row) => href("runs", { agent_name: exact(row.agent_name), status: BAD.join(","), created_after: since }),
    note: (row) => `${percent(row.runs / (all.get(row.agent_name) ?? row.runs))} of ${counted(all.get(row.agent_name) ?? row.runs, "run")}`,
    value: (row) => count(row.runs),
    size: (row) => row.runs,
    kind: "bad",
  }, rows[0]?.runs);
}

function slowest(groups, since) {
  const rows = groups.filter((group) => group.duration_ms?.p95 > 0).sort((a, b) => b.duration_ms.p95 - a.duration_ms.p95).slice(0, SHOWN);
  return ranking(rows, {
    href: (row) => href("runs", { agent_name: exact(row.agent_name), created_after: since }),
    note: (row) => `half within ${duration(row.duration_ms.p50)}`,
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
  const begun = h("p", { class: "quiet" });
  const figures = h("div", { class: "figures" });
  const chart = h("div", { class: "body chart-body" });
  const worst = h("div", { class: "body" });
  const slow = h("div", { class: "body" });
  const latest = h("div", { class: "body" });
  const alerts = alertsPanel(signal);
  let period = null;

  function load() {
    const now = Date.now();
    const from = beginning(period, now);
    const since = iso(from - 1).replace("Z", "999Z");
    begun.textContent = `whole hours since ${dayOf(new Date(from))}, ${timeOf(new Date(from))}`;
    const ask = (parameters) => get("api/v1/stats", { from: iso(from), ...parameters }, signal).then((answer) => answer.groups);
    const byHour = ask({ group_by: "status", bucket: "1h" });
    const byAgent = ask({ group_by: "agent_name" });
    fillLater(figures, signal, async () => {
      const [hours, agents] = await Promise.all([byHour, byAgent]);
      return tiles(hours, agents, period, since);
    });
    fillLater(chart, signal, async () => {
      const groups = await byHour;
      return groups.length ? stackedBars(bars(groups, from, period, now), signal) : sentence("No run in this time. telemetryd demo posts some.");
    });
    fillLater(slow, signal, async () => slowest(await byAgent, since));
    fillLater(worst, signal, async () => failing(await ask({ group_by: "agent_name", status: BAD.join(",") }), await byAgent, since));
    fillLater(latest, signal, async () => failures((await page(`api/v1/runs?status=${BAD.join(",")}&limit=${SHOWN + 2}&fields=${IN_LISTS}`, signal)).items));
  }

  function change(next) {
    const name = Object.hasOwn(PERIODS, next.period ?? "") ? next.period : "24h";
    period = PERIODS[name];
    heading.textContent = period.name;
    picker.replaceChildren(choice("Period", Object.keys(PERIODS).map((key) => [key, key, href("overview", key === "24h" ? {} : { period: key })]), name));
    load();
  }

  root.append(
    h("div", { class: "view-head" }, heading, picker, begun),
    figures,
    alerts.whole,
    panel("Runs per hour", chart),
    regressionsPanel(signal),
    h("div", { class: "columns" }, panel("Most failures", worst), panel("Slowest agents", slow, { note: "95 % end within" })),
    h("div", { class: "columns wide-left" }, panel("Latest failures", latest, { tools: h("a", { href: href("runs", { status: BAD.join(",") }) }, "All", h("span", { class: "unseen" }, " failures")) }), daemonPanel(signal)),
  );
  change(parameters);
  alerts.load();
  every(REFRESH_MS, signal, () => { load(); alerts.load(); });
  return change;
}
