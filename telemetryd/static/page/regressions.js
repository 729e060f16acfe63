// The commits since which runs are worse, with the runs that show it.

import { get } from "./api.js";
import { h, outside } from "./dom.js";
import { count, counted, duration, percent } from "./format.js";
import { fillLater, panel } from "./parts.js";
import { exact, href, runHref } from "./route.js";

const LETTERS = 12;

const MEASURES = {
  success_rate: { name: "success rate", value: (side) => percent(side.success_rate) },
  duration: { name: "half of the runs end within", value: (side) => duration(side.median_duration_ms) },
};

/** Return a probability as people say it. */
const chance = (p) => (p < 0.0001 ? `less than 1 in ${count(10_000)}` : `1 in ${count(Math.round(1 / p))}`);

function finding(found) {
  const { name, value } = MEASURES[found.measure];
  const chosen = { agent_name: exact(found.agent_name), job_type: exact(found.job_type), git_commit_hash: exact(found.first_bad_commit) };
  return h(
    "li",
    { class: "finding" },
    h("p", {}, h("a", { href: href("runs", chosen), "data-item": true, class: "name" }, `${found.agent_name}, ${found.job_type}`), ": ", name, " ", h("b", {}, value(found.before)), " before, ", h("b", { class: "worse" }, value(found.after)), " since commit ", h("code", { title: found.first_bad_commit }, outside(found.commit_url, found.first_bad_commit.slice(0, LETTERS)))),
    h("p", { class: "quiet" }, `By chance: ${chance(found.p_value)}. ${counted(found.before.runs, "run")} before, ${count(found.after.runs)} since. The last good commit is `, h("code", { title: found.last_good_commit }, found.last_good_commit.slice(0, LETTERS)), ". See the runs ", found.runs.map((eventId, index) => [index ? ", " : "", h("a", { href: runHref(eventId), title: eventId, "aria-label": `Run ${eventId}` }, count(index + 1))]), "."),
  );
}

/** Return a panel that is there only if something was found. */
export function regressionsPanel(signal) {
  const place = h("div", { class: "body" });
  const whole = panel("Which commit broke it", place, { id: "regressions", note: "last 30 days" });
  whole.hidden = true;
  fillLater(place, signal, async () => {
    try {
      const { regressions } = await get("api/v1/regressions", {}, signal);
      whole.hidden = regressions.length === 0;
      return h("ul", {}, regressions.map(finding));
    } catch (error) {
      whole.hidden = false;
      throw error;
    }
  });
  return whole;
}
