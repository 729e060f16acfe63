// The agents: each with its year in squares, which is asked for when it comes into view.

import { get } from "../api.js";
import { calendar, calendarKey, firstDay } from "../calendar.js";
import { h } from "../dom.js";
import { DAY, ZONE, counted, duration, now, short } from "../format.js";
import { fillLater, panel, problem, sentence } from "../parts.js";
import { midnight, moment, spans, within } from "../range.js";
import { share, successes } from "../rates.js";
import { exact, go, href } from "../route.js";

const AT_ONCE = 50;
const SPAN_DAYS = 30;

export const title = () => "Agents";

function together(one, other) {
  const finished = one.finished + other.finished;
  return { runs: one.runs + other.runs, finished, success_rate: finished ? (successes(one) + successes(other)) / finished : null };
}

async function year(agent, signal) {
  const today = now();
  const asked = { agent_name: exact(agent), group_by: "agent_name" };
  const answers = await Promise.all(spans(firstDay(today), midnight(today, 1)).map((span) => get("api/v1/stats", { ...asked, ...span }, signal)));
  const days = new Map();
  for (const group of answers.flatMap(({ groups }) => groups)) {
    const day = midnight(Date.parse(group.bucket)); // a day on which clocks are put back comes in two parts
    days.set(day, days.has(day) ? together(days.get(day), group) : group);
  }
  return calendar(agent, days, today, (from, to) => href("runs", { agent_name: exact(agent), ...within(from, to) }));
}

function card(agent, lately, total, watch) {
  const squares = h("div", { class: "body year" });
  const figures = lately
    ? [["Runs", short(lately.runs)], ["Succeeded", share(successes(lately), lately.finished)], ["Half within", duration(lately.duration_ms.p50)], ["95 % within", duration(lately.duration_ms.p95)]]
    : [["Runs", "none"]];
  const element = panel(agent, squares, {
    tools: h("dl", { class: "inline" }, figures.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
  });
  const heading = element.querySelector("h2");
  heading.replaceChildren(h("a", { href: href("runs", { agent_name: exact(agent) }), "data-item": true }, agent));
  heading.after(h("p", { class: "quiet" }, `${short(total)} in all`));
  watch(squares, agent);
  return element;
}

export function show(root, { parameters, signal }) {
  const cards = h("div", { class: "stack" });
  const tally = h("p", { class: "quiet tally", role: "status" });
  const search = h("input", { type: "search", id: "agent-search", placeholder: "Part of a name", autocomplete: "off", "data-search": true, on: { input: () => go(href("agents", { name: search.value.trim() }), true) } });
  let agents = null; // [name, runs in all, statistics of late]
  let wanted = "";

  const seer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      seer.unobserve(target);
      fillLater(target, signal, () => year(target.agent, signal)).then(() => target.firstChild?.scrollTo({ left: 1000 })); // to today
    }
  }, { rootMargin: "300px" });
  signal.addEventListener("abort", () => seer.disconnect(), { once: true });
  const watch = (element, agent) => {
    element.agent = agent;
    seer.observe(element);
  };

  function draw(most = AT_ONCE) {
    seer.disconnect();
    const found = agents.filter(([name]) => name.toLowerCase().includes(wanted.toLowerCase()));
    tally.textContent = counted(found.length, "agent");
    const rest = found.length - most;
    cards.replaceChildren(
      ...found.slice(0, most).map(([name, total, lately]) => card(name, lately, total, watch)),
      rest > 0 ? h("button", { type: "button", class: "button", on: { click: () => draw(most + AT_ONCE) } }, `Show more (${rest})`) : "",
      found.length ? "" : sentence(agents.length ? "No agent has such a name." : "There is no agent yet. telemetryd demo posts the runs of some."),
    );
  }

  async function load() {
    try {
      const [metrics, stats] = await Promise.all([
        get("metrics", {}, signal),
        get("api/v1/stats", { group_by: "agent_name", from: moment(now() - SPAN_DAYS * DAY) }, signal),
      ]);
      const lately = new Map(stats.groups.map((group) => [group.agent_name, group]));
      agents = Object.entries(metrics.agents).map(([name, total]) => [name, total, lately.get(name)]);
      agents.sort(([a, , x], [b, , y]) => (y?.runs ?? 0) - (x?.runs ?? 0) || a.localeCompare(b));
      draw();
    } catch (error) {
      if (!signal.aborted) cards.replaceChildren(problem(error.message));
    }
  }

  function change(next) {
    wanted = next.name ?? "";
    if (search !== document.activeElement) search.value = wanted;
    if (agents !== null) draw();
  }

  root.append(
    h("div", { class: "view-head" }, h("h1", {}, "Agents"), tally, h("div", { class: "field inline-field" }, h("label", { for: "agent-search", class: "unseen" }, "Search agents"), search)),
    h("div", { class: "view-head lead" }, h("p", { class: "quiet" }, `Figures of the last ${SPAN_DAYS} days; squares of the last year, days of ${ZONE}.`), calendarKey()),
    cards,
  );
  cards.append(sentence("Loading …"));
  change(parameters);
  load();
  return change;
}
