// The table of runs: filters in the address, lines as far as one scrolls, and new ones as they come.

import { address, get, page } from "../api.js";
import { h, plain, say } from "../dom.js";
import { DAY, count, counted, fullTime, now } from "../format.js";
import { onHealth } from "../health.js";
import { stepWith } from "../keyboard.js";
import { IN_LISTS, problem, sentence, summaryOf, took, when } from "../parts.js";
import { filtersOf, lastNight, rangeFields, within } from "../range.js";
import { go, href, runHref } from "../route.js";
import { STATUSES, badge, shape } from "../status.js";
import { follow } from "../stream.js";
import { virtualList } from "../virtual.js";

const PAGE = 200;
const FILTERS = ["q", "error", "status", "agent_name", "job_type", "environment", "host", "git_commit_hash", "parent_run_id", "retry_of", "conversation_id", "trace_id", "created_after", "created_before", "min_duration_ms"];
const LABEL = "label."; // what the name of a label's filter begins with
const SINCE = [["", "Any time"], ["-1h", "Last hour"], ["-24h", "Last 24 hours"], ["-7d", "Last 7 days"], ["-30d", "Last 30 days"]];
const [NIGHT, OWN] = ["night", "own"]; // which the address holds as from and to
const OF_RANGES = ["from", "to", "created_after", "created_before"];
const TYPING_MS = 350;

export const title = () => "Runs";

function cell(kind, ...content) {
  return h("div", { class: `cell ${kind}`, role: "cell" }, content);
}

function line(run) {
  const handled = run.items_succeeded + run.items_failed + run.items_skipped;
  const items = run.items_failed ? h("span", { class: "bad-text" }, `${count(run.items_failed)} of ${count(handled)} failed`) : handled ? count(handled) : "–";
  return h(
    "div",
    { class: "line", role: "row" },
    cell("state", badge(run.status)),
    cell("who", h("a", { href: runHref(run.event_id), class: "cover" }, run.agent_name), h("span", { class: "quiet" }, run.job_type)),
    cell(run.error_summary ? "what bad-text" : "what quiet", summaryOf(run) || "–"),
    cell("number items", items),
    cell("number took", took(run) ?? "–"),
    cell("number begun", when(run.created_at)),
  );
}

const HEADS = [["state", "Status"], ["who", "Agent and job"], ["what", "What happened"], ["number items", "Items"], ["number took", "Duration"], ["number begun", "Created"]];

const NO_RANGE = Object.fromEntries(OF_RANGES.map((name) => [name, null]));

/** Return a moment of a filter in local time, or as it stands there if it is none, such as -2h. */
const momentText = (text) => (/^\d{4}-/.test(text) && !Number.isNaN(Date.parse(text)) ? fullTime(text) : text);

const isFilter = (name) => FILTERS.includes(name) || name.startsWith(LABEL);

/** Return the field `name` of the filter bar. */
function field(name, label, control) {
  control.id = `filter-${name}`;
  control.name = name;
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control);
}

function filterBar(onChange) {
  const agents = h("datalist", { id: "agents" });
  const jobs = h("datalist", { id: "jobs" });
  const since = h("select", {}, [...SINCE, [NIGHT, "Last night, 22–06"], [OWN, "From … to …"]].map(([value, text]) => h("option", { value }, text)));
  const range = rangeFields((given) => onChange({ ...values(), ...NO_RANGE, ...given }));
  const controls = {
    q: h("input", { type: "search", placeholder: "Words in summaries and errors", autocomplete: "off", "data-search": true }),
    error: h("input", { type: "search", placeholder: "Part of an error", autocomplete: "off", "data-search": true }),
    agent_name: h("input", { list: "agents", placeholder: "any, * for parts", autocomplete: "off" }),
    job_type: h("input", { list: "jobs", placeholder: "any", autocomplete: "off" }),
  };
  const label = h("input", { placeholder: "team=search", autocomplete: "off", on: { change: labelled } });
  const statuses = STATUSES.map((status) => {
    const box = h("input", { type: "checkbox", value: status, class: "unseen" });
    return { box, label: h("label", { class: `check ${status}` }, box, shape(status), status) };
  });
  const words = field("q", "Search", controls.q);
  const errors = field("error", "Search errors", controls.error);
  const form = h(
    "form",
    { class: "filters", role: "search", novalidate: true, "aria-label": "Filter runs", on: { submit: (event) => { event.preventDefault(); changed(); }, change: changed, input: typed } },
    words,
    errors,
    field("agent_name", "Agent", controls.agent_name),
    field("job_type", "Job type", controls.job_type),
    field("label", "Label", label),
    field("since", "Created", since),
    range.element,
    h("fieldset", { class: "checks" }, h("legend", {}, "Status"), statuses.map(({ label }) => label)),
    agents,
    jobs,
  );
  let timer = null;
  let shown = {}; // what the address says; while it stays, a field with the focus is left to its writer

  function typed(event) {
    clearTimeout(timer);
    if (event.target === controls.q || event.target === controls.error) timer = setTimeout(changed, TYPING_MS);
  }
  function values() {
    const chosen = statuses.filter(({ box }) => box.checked).map(({ box }) => box.value);
    shown = Object.fromEntries(Object.entries(controls).map(([name, control]) => [name, control.value.trim()]));
    return { ...shown, status: chosen.join(",") };
  }
  function changed(event) {
    clearTimeout(timer);
    onChange({ ...values(), ...(event?.target === since ? rangeOf(since.value) : {}) });
  }
  /** Add a label to the filters, which then stands among those without a field. */
  function labelled(event) {
    event.stopPropagation();
    const [, name, value] = /^\s*([^=]+?)\s*=\s*(.+?)\s*$/.exec(label.value) ?? [];
    label.setCustomValidity(label.value && !name ? "Write a label as name=value, such as team=search" : "");
    if (!label.reportValidity() || !name) return;
    label.value = "";
    onChange({ ...values(), [LABEL + name]: value });
  }
  function rangeOf(value) {
    const night = lastNight(now());
    if (value === NIGHT) return { ...NO_RANGE, ...within(night.from, night.to) };
    if (value === OWN) return { ...NO_RANGE, ...within(now() - DAY, now()) };
    return { ...NO_RANGE, created_after: value };
  }
  function offerSearch(isThere) {
    const field = document.activeElement;
    words.hidden = !isThere;
    errors.hidden = isThere;
    if (field === controls.error && isThere) controls.q.focus();
  }
  offerSearch(false); // until the daemon says that it can

  return {
    form,
    focusSearch: () => (words.hidden ? controls.error : controls.q).focus(),
    offerSearch,
    offer(metadata) {
      const option = (value) => h("option", { value, label: plain(value) === value ? null : value });
      agents.replaceChildren(...metadata.agent_names.map(option));
      jobs.replaceChildren(...metadata.job_types.map(option));
    },
    set(parameters) {
      const isOwn = Boolean(parameters.from || parameters.to);
      const after = parameters.created_after ?? "";
      if (![...since.options].some((option) => option.value === after)) {
        since.append(h("option", { value: after }, after.startsWith("-") ? `Last ${after.slice(1)}` : `After ${momentText(after)}`));
      }
      since.value = isOwn ? OWN : after;
      range.element.hidden = !isOwn;
      range.set(parameters);
      for (const [name, control] of Object.entries(controls)) {
        const given = parameters[name] ?? "";
        if (control !== document.activeElement || given !== shown[name]) control.value = given;
        shown[name] = given;
      }
      const chosen = (parameters.status ?? "").split(",");
      for (const { box } of statuses) box.checked = chosen.includes(box.value);
    },
    /** Return the filters that have no control of their own. */
    others: (parameters) => Object.keys(parameters).filter((name) => isFilter(name) && parameters[name] && (!(name in controls) || controls[name].closest("[hidden]")) && !["status", "created_after"].includes(name)),
  };
}

export function show(root, { parameters, signal }) {
  let filters = {};
  const items = [];
  let next = null;
  let isLoading = false;
  let list = null;
  let load = new AbortController();
  let tail = null;
  let waiting = [];

  const bar = filterBar((given) => go(href("runs", { ...parameters, ...given, focus: null }), true));
  const chips = h("div", { class: "chips" });
  const live = h("button", { type: "button", class: "button live", "aria-pressed": "false", on: { click: () => go(href("runs", { ...parameters, live: parameters.live ? null : "1" }), true) } }, h("span", { class: "dot" }), h("span", {}, "Live"));
  const tally = h("p", { class: "quiet tally", role: "status" });
  const fresh = h("button", { type: "button", class: "fresh", hidden: true, on: { click: showFresh } });
  const lines = h("div", { class: "table-body", role: "rowgroup" });
  const foot = h("div", { class: "foot" });
  const table = h("div", { class: "table", role: "table", "aria-label": "Runs", "aria-rowcount": -1 }, h("div", { role: "rowgroup", class: "table-head" }, h("div", { role: "row", class: "line head", "aria-rowindex": 1 }, HEADS.map(([kind, text]) => h("div", { class: `cell ${kind}`, role: "columnheader" }, text)))), lines);

  function tell() {
    const shown = next ? `The newest ${counted(items.length, "run")}; more come as you scroll` : counted(items.length, "run");
    tally.textContent = shown;
    foot.replaceChildren(isLoading ? sentence("Loading …") : items.length ? "" : sentence(Object.keys(filters).length ? "No run matches. Fewer filters may show more." : "There is no run yet. telemetryd demo posts some."));
  }

  async function more(first) {
    if (isLoading || (!first && next === null)) return;
    const mine = load.signal;
    isLoading = true;
    try {
      const answer = await page(first ?? next, mine);
      if (mine.aborted) return;
      const known = new Set(items.map((run) => run.event_id));
      items.push(...answer.items.filter((run) => !known.has(run.event_id)));
      next = answer.next;
      isLoading = false;
      tell();
      list.refresh();
    } catch (error) {
      if (mine.aborted) return;
      isLoading = false;
      next = null;
      tally.textContent = "";
      foot.replaceChildren(problem(error.message), error.status === 400 && filters.q ? elsewhere() : "");
    }
  }

  /** Return the way to search without the full-text index, which a daemon need not have. */
  function elsewhere() {
    return h("p", {}, h("a", { href: href("runs", { ...parameters, q: null, error: filters.q }) }, `Look for “${filters.q}” in error texts only`));
  }

  function showFresh() {
    items.unshift(...waiting.splice(0).reverse());
    fresh.hidden = true;
    scrollTo({ top: 0 });
    tell();
    list.refresh();
  }

  function arrived(run) {
    const at = items.findIndex((known) => known.event_id === run.event_id);
    if (at !== -1) {
      items[at] = run;
      list.refresh();
      return;
    }
    const before = waiting.findIndex((known) => known.event_id === run.event_id);
    if (before !== -1) {
      waiting[before] = run;
    } else if (!filters.status || filters.status.split(",").includes(run.status)) {
      waiting.push({ ...run, isNew: true });
    }
    if (scrollY < 80) {
      items.unshift(...waiting.splice(0).reverse());
      tell();
      list.refresh();
    } else if (waiting.length) {
      fresh.textContent = `↑ ${counted(waiting.length, "new run")}`;
      fresh.hidden = false;
    }
  }

  function listen() {
    tail?.abort();
    tail = null;
    waiting = [];
    fresh.hidden = true;
    const isOn = Boolean(parameters.live);
    live.setAttribute("aria-pressed", String(isOn));
    live.classList.remove("waiting");
    if (!isOn) return;
    tail = new AbortController();
    signal.addEventListener("abort", () => tail?.abort(), { once: true });
    // A run leaves a status while it is looked at, so the stream is asked for all of them.
    follow({ ...filters, status: null }, tail.signal, {
      onRun: arrived,
      onMissed: (missed) => say(`${counted(missed, "change")} came too fast and are missing here`),
      onState(state, why) {
        live.classList.toggle("waiting", state === "waiting");
        if (state === "refused") foot.replaceChildren(problem(`Live: ${why}`));
        if (state === "live") say("Live: new runs appear by themselves");
      },
    });
  }

  function change(given) {
    const before = JSON.stringify([filters, Boolean(parameters.live)]);
    parameters = given;
    filters = { ...Object.fromEntries(Object.entries(given).filter(([name, value]) => value && isFilter(name))), ...filtersOf(given) };
    bar.set(given);
    drawChips();
    if (given.focus) bar.focusSearch();
    if (list !== null && before === JSON.stringify([filters, Boolean(given.live)])) return;
    load.abort();
    load = new AbortController();
    isLoading = false;
    next = null;
    items.length = 0;
    list ??= virtualList(lines, items, { keyOf: (run) => run.event_id, render: (run) => withMark(run), onNear: () => more(), signal });
    list.refresh();
    more(address("api/v1/runs", { ...filters, limit: PAGE, fields: IN_LISTS }));
    tell();
    listen();
  }

  function drawChips() {
    chips.replaceChildren(...bar.others(parameters).map((name) =>
      h("a", { class: "chip", href: href("runs", { ...parameters, [name]: null }), "aria-label": `Remove the filter ${name}` }, `${name.startsWith(LABEL) ? name : name.replaceAll("_", " ")}: ${name.startsWith("created") ? momentText(parameters[name]) : parameters[name]}`, h("span", { "aria-hidden": "true" }, " ×"))));
  }

  function withMark(run) {
    const element = line(run);
    if (run.isNew) element.classList.add("new");
    return element;
  }

  stepWith((by) => {
    const at = list.focused();
    const index = at === -1 ? (by > 0 ? 0 : items.length - 1) : Math.max(0, Math.min(items.length - 1, at + by));
    if (items.length) list.focus(index);
  });
  signal.addEventListener("abort", () => load.abort(), { once: true });
  root.append(h("div", { class: "view-head" }, h("h1", {}, "Runs"), tally, live), bar.form, chips, fresh, table, foot);
  let searches = false;
  onHealth((health) => {
    if (searches === (health.full_text === "ready")) return;
    searches = !searches;
    bar.offerSearch(searches);
    drawChips();
  }, signal);
  get("api/v1/metadata", {}, signal).then(bar.offer, () => {}); // only offers; the list says what is wrong
  change(parameters);
  return change;
}
