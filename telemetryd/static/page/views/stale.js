// Runs that still run but have not been heard of for a while, and the button that cancels them.

import { address, page, post } from "../api.js";
import { h, say } from "../dom.js";
import { DAY, HOUR, MINUTE, SECOND, ago, counted, duration, now } from "../format.js";
import { IN_LISTS, choice, copyButton, every, panel, problem, sentence, when } from "../parts.js";
import { href, runHref } from "../route.js";
import { badge } from "../status.js";

const AGES = ["15m", "1h", "6h", "1d", "7d"];
const UNITS = { s: SECOND, m: MINUTE, h: HOUR, d: DAY, w: 7 * DAY };
const MOST = 1000;
const REFRESH_MS = 15_000;
const REAP = "api/v1/admin/reap";

export const title = () => "Stale runs";

const msOf = (age) => parseFloat(age) * UNITS[age.at(-1)];

async function find(before, signal) {
  const found = [];
  let next = address("api/v1/runs", { status: "running", created_before: before, limit: 500, fields: IN_LISTS });
  while (next !== null && found.length < MOST) {
    const answer = await page(next, signal);
    found.push(...answer.items);
    next = answer.next;
  }
  return { found, isAll: next === null };
}

function list(runs, emptyText) {
  if (!runs.length) return sentence(emptyText);
  return h("ul", { class: "lines" }, runs.map((run) =>
    h("li", {}, h("a", { href: runHref(run.event_id), "data-item": true },
      badge(run.status), h("span", { class: "name" }, run.agent_name), h("span", { class: "quiet what" }, run.job_type),
      h("span", { class: "quiet begun" }, `begun ${ago(run.start_time)}`), h("span", { class: "silent" }, "silent for ", h("b", {}, duration(now() - Date.parse(run.updated_at))))))));
}

/** Ask whether so many runs are to be cancelled; answer true or false. */
function confirm(matching, age) {
  return new Promise((resolve) => {
    const close = (answer) => () => dialog.close(answer);
    const dialog = h("dialog", { class: "dialog", "aria-labelledby": "reap-title", on: { close: () => { dialog.remove(); resolve(dialog.returnValue === "yes"); } } },
      h("h2", { id: "reap-title" }, `Cancel ${counted(matching, "run")}?`),
      h("p", {}, `They still run, but have not been heard of for ${age}. They become cancelled, with an end time of now. A process that is still alive can correct that by finishing its run.`),
      h("div", { class: "actions" }, h("button", { type: "button", class: "button", on: { click: close("no") } }, "Leave them"), h("button", { type: "button", class: "button danger", on: { click: close("yes") } }, `Cancel ${counted(matching, "run")}`)));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Whether the daemon forbids it, or a proxy does not let it through (examples/nginx.conf answers 404). */
const isRefused = (error) => error.status === 403 || (error.status === 404 && error.isOfProxy);

/** Show the command that does the same on the daemon's machine, where it is known. */
function forbidden(error, age) {
  const socket = /Unix socket (\/.*), used by/.exec(error.message);
  if (!socket && !error.isOfProxy) return problem(`This page may not cancel runs here: ${error.message}`);
  const through = socket ? ` --unix '${socket[1].replaceAll("'", "'\\''")}'` : "";
  const command = `telemetryd reap --older-than ${age}${through}`;
  return h("div", { class: "note warn", role: "alert" }, h("p", {}, "This page may not cancel runs here; on the daemon's machine, this command does the same:"), h("p", { class: "command" }, h("code", {}, command), copyButton(command, "the command")), h("p", { class: "quiet" }, `${error.message.replace(/\.$/, "")}.`));
}

export function show(root, { parameters, signal }) {
  const picker = h("div", {});
  const outcome = h("div", {});
  const silent = h("div", { class: "body" }, sentence("Asking …"));
  const alive = h("div", { class: "body" }, sentence("Asking …"));
  const reap = h("button", { type: "button", class: "button danger", disabled: true, on: { click: ask } }, "Cancel them");
  let age = null;

  async function ask() {
    reap.disabled = true;
    try {
      const chosen = { older_than: age };
      const { matching } = await post(REAP, { ...chosen, dry_run: true });
      if (matching === 0) {
        outcome.replaceChildren(h("p", { class: "note" }, "There is none to cancel any more."));
      } else if (await confirm(matching, age)) {
        let done = 0;
        for (let more = true; more; ) {
          const answer = await post(REAP, chosen);
          done += answer.reaped;
          more = answer.more;
        }
        const said = `${counted(done, "run")} cancelled.`;
        outcome.replaceChildren(h("p", { class: "note" }, said));
        say(said);
      }
    } catch (error) {
      outcome.replaceChildren(isRefused(error) ? forbidden(error, age) : problem(error.message));
    }
    await load();
  }

  async function load() {
    const since = now() - msOf(age);
    try {
      const { found, isAll } = await find(new Date(since).toISOString(), signal);
      const isSilent = (run) => Date.parse(run.updated_at) < since;
      const stale = found.filter(isSilent).sort((a, b) => a.updated_at.localeCompare(b.updated_at));
      if (signal.aborted) return;
      silent.replaceChildren(list(stale, `Every run has been heard of within ${age}.`), isAll ? "" : sentence(`The newest ${MOST} running runs were looked at; there are more.`));
      alive.replaceChildren(list(found.filter((run) => !isSilent(run)), "None."));
      reap.disabled = stale.length === 0;
      reap.textContent = stale.length ? `Cancel ${isAll ? counted(stale.length, "run") : "all of them"}` : "Nothing to cancel";
    } catch (error) {
      if (!signal.aborted) silent.replaceChildren(problem(error.message));
    }
  }

  function change(next) {
    age = /^\d+(\.\d+)?[smhdw]$/.test(next.older_than ?? "") ? next.older_than : "1h";
    const ages = AGES.includes(age) ? AGES : [age, ...AGES];
    picker.replaceChildren(choice("Silent for at least", ages.map((value) => [value, value, href("stale", { older_than: value })]), age));
    outcome.replaceChildren();
    load();
  }

  root.append(
    h("div", { class: "view-head" }, h("h1", {}, "Stale runs"), h("span", { class: "quiet" }, "silent for at least"), picker),
    h("p", { class: "quiet lead" }, "A run that still runs but shows no sign of life (no heartbeat, event or change) has probably lost its process."),
    outcome,
    panel("Silent", silent, { tools: reap }),
    panel("Running long, but still reporting", alive),
  );
  change(parameters);
  every(REFRESH_MS, signal, load);
  return change;
}
