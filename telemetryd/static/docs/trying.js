// The form that sends an operation to this daemon and shows what it answers.

import { h } from "../../page/dom.js";

const MOST = 200_000; // characters of an answer that are shown

const shown = (example) => (example === undefined ? "" : typeof example === "string" ? example : JSON.stringify(example, null, 2));

function inputs(operation) {
  return (operation.parameters ?? []).map((parameter) => {
    const id = `${operation.operationId}-${parameter.in}-${parameter.name}`;
    const example = parameter.schema?.examples?.[0] ?? "";
    const input = h("input", { id, autocomplete: "off", spellcheck: "false", placeholder: example, required: parameter.in === "path" });
    return { parameter, input, view: h("div", { class: "field" }, h("label", { for: id }, parameter.name), input) };
  });
}

function bodies(operation) {
  const content = operation.requestBody?.content;
  if (!content) return null;
  const types = Object.keys(content);
  const type = h("select", { id: `${operation.operationId}-type` }, types.map((one) => h("option", { value: one }, one)));
  const text = h("textarea", { id: `${operation.operationId}-body`, rows: "10", spellcheck: "false" });
  const fill = () => {
    text.value = shown(content[type.value].example);
  };
  type.addEventListener("change", fill);
  fill();
  return { type, text, view: [h("div", { class: "field" }, h("label", { for: type.id }, "Media type"), type), h("div", { class: "field" }, h("label", { for: text.id }, "Body"), text)] };
}

/** Return what the form asks for: relative to this page, which may be below the sub-path of a proxy. */
function request(path, method, fields, body) {
  const query = new URLSearchParams();
  const headers = {};
  let target = path.slice(1);
  for (const { parameter, input } of fields) {
    if (parameter.in === "path") target = target.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
    else if (input.value === "") continue;
    else if (parameter.in === "query") query.append(parameter.name, input.value);
    else headers[parameter.name] = input.value;
  }
  if (body) headers["Content-Type"] = body.type.value;
  return { url: query.size ? `${target}?${query}` : target, options: { method: method.toUpperCase(), headers, body: body?.text.value } };
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl({ url, options }) {
  const headers = Object.entries(options.headers).map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`);
  const data = options.body === undefined ? [] : [`--data-binary ${quoted(options.body)}`];
  return ["curl", ...(options.method === "GET" ? [] : ["-X", options.method]), quoted(new URL(url, location).href), ...headers, ...data].join(" ");
}

/** Read an answer bit by bit, as a stream has no end. */
async function read(answer, output) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    text += part.value;
    output.textContent = text.slice(0, MOST);
    if (text.length > MOST) {
      await reader.cancel();
      return `${text.slice(0, MOST)}\n…`;
    }
  }
  if (!answer.headers.get("content-type")?.startsWith("application/json")) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // a number that JSON has no form for
  }
}

/** Return the form of an operation; `ask` sends a request with the reader's token. */
export function tryView(ask, path, method, operation) {
  const fields = inputs(operation);
  const body = bodies(operation);
  const status = h("p", { role: "status" });
  const command = h("pre", { tabindex: "0" });
  const output = h("pre", { class: "answer", tabindex: "0" });
  const stop = h("button", { type: "button", class: "button", hidden: true }, "Stop");
  const result = h("div", { class: "result", hidden: true }, command, status, output);
  const form = h("form", { on: { submit: send } },
    h("h3", {}, "Try it"), h("div", { class: "fields" }, fields.map((field) => field.view)), body?.view ?? null,
    h("div", { class: "actions" }, h("button", { type: "submit", class: "button primary" }, "Send"), stop), result);

  async function send(event) {
    event.preventDefault();
    const asked = request(path, method, fields, body);
    const control = new AbortController();
    stop.onclick = () => control.abort();
    stop.hidden = result.hidden = false;
    command.textContent = asCurl(asked);
    status.textContent = "…";
    output.textContent = "";
    const started = performance.now();
    try {
      const answer = await ask(asked.url, { ...asked.options, signal: control.signal });
      status.textContent = `${answer.status} ${answer.statusText}, ${Math.round(performance.now() - started)} ms`;
      output.textContent = await read(answer, output);
    } catch (error) {
      status.textContent = control.signal.aborted ? `${status.textContent} Stopped.` : `No answer: ${error.message}`;
    } finally {
      stop.hidden = true;
    }
  }

  return form;
}
