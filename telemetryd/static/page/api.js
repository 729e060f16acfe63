// Speaks to the daemon: JSON in and out, the token where one is needed, errors as sentences.
// Every address is relative to the page, which a proxy may show under a path of its own.

import { setClock } from "./format.js";
import { asHeader, askForToken, storedToken } from "./token.js";

/** An answer that is no success; `status` is 0 if there was no answer, `isOfProxy` says that the daemon did not give it. */
export class ApiError extends Error {
  constructor(status, sentence, isOfProxy = false) {
    super(sentence);
    this.status = status;
    this.isOfProxy = isOfProxy;
  }
}

/** Return a path with its query; parameters that are null or empty are left out. */
export function address(path, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const query = new URLSearchParams(given).toString();
  return query ? `${path}?${query}` : path;
}

/** Return the path of a run. */
export const runPath = (eventId) => `api/v1/runs/${encodeURIComponent(eventId)}`;

async function sentenceOf(response, isOfProxy) {
  if (isOfProxy) return `A proxy in front of the daemon answered ${response.status}.`;
  try {
    const { detail } = await response.json();
    return typeof detail === "string" ? detail : detail.map((fault) => `${fault.loc.join(".")}: ${fault.msg}`).join(". ");
  } catch {
    return `The daemon answered ${response.status}.`;
  }
}

/** Whether the token may not do this; one that may not even read is of no use to the page. */
const lacksScope = (response) => response.status === 403 && /insufficient_scope/.test(response.headers.get("WWW-Authenticate") ?? "");

/** Send a request until it is not refused for its token; return the response. */
export async function send(path, { accepted = [], headers = {}, ...options } = {}) {
  for (;;) {
    const token = storedToken();
    const all = { Accept: "application/json", ...headers, ...(token === null ? {} : { Authorization: asHeader(token) }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers: all, credentials: "omit", cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ApiError(0, "The daemon does not answer. Does it run?");
    }
    setClock(response.headers.get("Date"));
    if (response.status === 401 || (options.method === undefined && lacksScope(response))) {
      await askForToken(token);
    } else if (response.ok || accepted.includes(response.status)) {
      return response;
    } else {
      const isOfProxy = !response.headers.has("Telemetry-Server");
      throw new ApiError(response.status, await sentenceOf(response, isOfProxy), isOfProxy);
    }
  }
}

/** Answer the decoded JSON of a GET. */
export async function get(path, parameters, signal, accepted) {
  const response = await send(address(path, parameters), { signal, accepted });
  return response.json();
}

/** Answer one page of a list, and the address of the next (null after the last). */
export async function page(whole, signal) {
  const response = await send(whole, { signal });
  const link = /<[^>?]*(\?[^>]*)>;\s*rel="next"/.exec(response.headers.get("Link") ?? "");
  // The daemon does not know under which path a proxy shows it: only the query says where to go on.
  return { items: await response.json(), next: link && whole.split("?")[0] + link[1] };
}

/** Answer the decoded JSON of a POST. */
export async function post(path, body) {
  const response = await send(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  return response.json();
}
