// What the rules of alerts are firing for now.

import { get } from "./api.js";
import { h } from "./dom.js";
import { counted } from "./format.js";
import { fillLater, panel, sentence, when } from "./parts.js";
import { exact, href } from "./route.js";
import { BAD } from "./status.js";

const SHOWN = 6;

/** Which runs of its subject an alert is about, by the kind of its rule. */
const STATUS = { "failure-rate": BAD.join(","), slow: "running", stale: "running" };

function line({ rule, subject, since, summary }) {
  const named = { agent_name: subject.agent_name, job_type: subject.job_type, git_commit_hash: subject.first_bad_commit };
  const chosen = Object.fromEntries(Object.entries(named).map(([name, value]) => [name, value && exact(value)]));
  return h(
    "li",
    { class: "finding" },
    h("p", { class: "alert" }, h("span", { class: "pill ill" }, rule.name), h("a", { href: href("runs", { ...chosen, status: STATUS[rule.kind] }), "data-item": true, class: "name" }, subject.job_type ? `${subject.agent_name}, ${subject.job_type}` : subject.agent_name), h("span", { class: "quiet" }, "began ", when(since)), h("span", { class: "quiet said" }, summary)),
  );
}

function list(rules) {
  const firing = rules.flatMap((rule) => rule.firing.map((each) => ({ ...each, rule }))).sort((a, b) => b.since.localeCompare(a.since));
  const lines = firing.map(line);
  const troubled = rules.filter((rule) => rule.problem);
  return [
    lines.length ? h("ul", {}, lines.slice(0, SHOWN)) : sentence(`Nothing is wrong by ${counted(rules.length, "rule")}.`),
    lines.length > SHOWN ? h("details", { class: "alerts-more" }, h("summary", {}, `${lines.length - SHOWN} more`), h("ul", {}, lines.slice(SHOWN))) : "",
    ...rules.filter((rule) => rule.more).map((rule) => h("p", { class: "note" }, `${rule.name}: ${rule.more.toLocaleString("en")} more, which are not listed.`)),
    ...troubled.map((rule) => h("p", { class: "note warn" }, `${rule.name} cannot be evaluated: ${rule.problem}`)),
  ];
}

/** Return a panel that is there only if there are rules, and what fills it anew. */
export function alertsPanel(signal) {
  const place = h("div", { class: "body" });
  const whole = panel("Alerts", place, { id: "alerts" });
  whole.hidden = true;
  const load = () => fillLater(place, signal, async () => {
    try {
      const { rules } = await get("api/v1/alerts", {}, signal);
      whole.hidden = rules.length === 0;
      return list(rules);
    } catch (error) {
      whole.hidden = false;
      throw error;
    }
  });
  return { whole, load };
}
