// The commits since which runs are worse, what speaks for each of them, and the runs that show it.

import { get } from "./api.js";
import { h, outside } from "./dom.js";
import { count, counted, duration, percent } from "./format.js";
import { fillLater, panel } from "./parts.js";
import { exact, href, runHref } from "./route.js";

const LETTERS = 12;

const points = (difference) => (Math.abs(difference) * 100).toFixed(1);
const direction = (difference) => (difference <= 0 ? "less" : "more");
const times = (factor) => factor.toFixed(2);

/** Return between which bounds a difference of rates lies, the smallest fall first: 65.3 to 82.4 less. */
function pointsBetween(low, high) {
  const isOneWay = direction(low) === direction(high);
  return `${points(high)}${isOneWay ? "" : ` ${direction(high)}`} to ${points(low)} ${direction(low)}`;
}

const MEASURES = {
  success_rate: {
    name: "success rate",
    value: (side) => percent(side.success_rate),
    runs: "run",
    change: ({ value }) => `${points(value)} points ${direction(value)}`,
    between: ({ low, high }) => pointsBetween(low, high),
    others: ({ before, after }) => `succeeded in ${percent(before.success_rate)} before, ${percent(after.success_rate)} since`,
  },
  duration: {
    name: "half of the runs end within",
    value: (side) => duration(side.median_duration_ms),
    runs: "successful run",
    change: ({ value }) => `${times(value)} times as long`,
    between: ({ low, high }) => `${times(low)} to ${times(high)}`,
    others: ({ factor }) => `took ${times(factor)} times as long as before`,
  },
};

/** Return a probability as people say it. */
const chance = (p) => `1 in ${count(Math.floor(1 / p))}`;

const commit = (hash, address = null) => h("code", { title: hash }, outside(address, hash.slice(0, LETTERS)));

/** Return what became worse, since which commit, after what is to be said first. */
function headline(found, ...first) {
  const { name, value } = MEASURES[found.measure];
  const chosen = { agent_name: exact(found.agent_name), job_type: exact(found.job_type), git_commit_hash: exact(found.first_bad_commit) };
  return h("p", {}, first, h("a", { href: href("runs", chosen), "data-item": true, class: "name" }, `${found.agent_name}, ${found.job_type}`), ": ", name, " ", h("b", {}, value(found.before)), " before, ", h("b", { class: "worse" }, value(found.after)), " since commit ", commit(found.first_bad_commit, found.commit_url));
}

function change({ measure, effect }) {
  const { change, between } = MEASURES[measure];
  return [h("b", {}, change(effect)), effect.low === null ? ", too few days for an interval" : `, 95 % interval ${between(effect)}`];
}

function side({ days, runs, commits }, noun) {
  return `${counted(days, "day")} (${counted(runs, noun)}, ${counted(commits, "commit")})`;
}

function others({ measure, others }) {
  if (others.agents === 0) return "none ran on both sides: nothing tells whether it was all of them";
  const told = `${counted(others.agents, "agent")} ${MEASURES[measure].others(others)}`;
  return others.as_well ? [h("span", { class: "pill" }, "worse as well"), ` ${told}: hardly one commit's work`] : told;
}

/** Return what speaks for a finding, and against it. */
function evidence(found) {
  const { runs } = MEASURES[found.measure];
  const facts = [
    ["Change", change(found)],
    ["Before", [side(found.before, runs), "; the last good commit is ", commit(found.last_good_commit)]],
    ["Since", [side(found.after, runs), "; see runs ", found.runs.map((eventId, index) => [index ? ", " : "", h("a", { href: runHref(eventId), title: eventId, "aria-label": `Run ${eventId}` }, count(index + 1))])]],
    ["Others", others(found)],
    ["Left out", found.left_out_hours ? `${counted(found.left_out_hours, "hour")} in which other agents failed, too` : null],
    ["By chance", `at most ${chance(found.p_value)}`],
  ];
  return h("dl", { class: "evidence" }, facts.filter(([, fact]) => fact !== null).map(([name, fact]) => h("div", {}, h("dt", {}, name), h("dd", {}, fact))));
}

const finding = (found) => h("li", { class: "finding" }, headline(found), evidence(found));

/** Return what may be a finding in some days, and what is missing until then. */
function early(found, least) {
  const days = `Days with runs: ${count(found.before.days)} before, ${count(found.after.days)} since. It takes ${count(least)} on each side to tell a commit from an outage.`;
  return h("li", { class: "finding" }, headline(found, h("span", { class: "pill" }, "too early to tell"), " "), h("p", { class: "quiet" }, days), evidence(found));
}

const LIMIT = "Runs can only show since when it is worse, and which commit ran first then. Whatever else changed for good at that moment (input, model, configuration, machine) looks the same.";

/** Return a panel that is there only if something was found, or may be. */
export function regressionsPanel(signal) {
  const place = h("div", { class: "body" });
  const whole = panel("Which commit broke it", place, { id: "regressions", note: "last 30 days" });
  whole.hidden = true;
  fillLater(place, signal, async () => {
    try {
      const { regressions, too_early, min_days } = await get("api/v1/regressions", {}, signal);
      whole.hidden = regressions.length + too_early.length === 0;
      return [h("ul", {}, regressions.map(finding), too_early.map((found) => early(found, min_days))), h("p", { class: "quiet limit" }, LIMIT)];
    } catch (error) {
      whole.hidden = false;
      throw error;
    }
  });
  return whole;
}
