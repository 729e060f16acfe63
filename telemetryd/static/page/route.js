// The address bar holds all state: #/view/name?parameters.

/** Return the view, its name (such as an event_id) and its parameters. */
export function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [view, ...rest] = path.split("/");
  let name = null;
  try {
    name = rest.length ? decodeURIComponent(rest.join("/")) : null;
  } catch {
    name = rest.join("/"); // a percent sign that nobody encoded
  }
  return { view: view || "overview", name, parameters: Object.fromEntries(new URLSearchParams(query)) };
}

/** Return the address of a view within the page. */
export function href(view, parameters = {}, name = null) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const query = new URLSearchParams(given).toString();
  const path = `#/${view === "overview" ? "" : view}${name === null ? "" : `/${encodeURIComponent(name)}`}`;
  return query ? `${path}?${query}` : path;
}

/** Return the address of a run. */
export const runHref = (eventId) => href("run", {}, eventId);

/** Go to an address; `replace` leaves no step for the back button. */
export function go(address, replace = false) {
  if (!replace) {
    location.hash = address;
  } else if (address !== location.hash) {
    history.replaceState(null, "", address);
    dispatchEvent(new HashChangeEvent("hashchange"));
  }
}

/** Return a value as it stands in a filter that means exactly this one. */
export const exact = (value) => value.replace(/[\\,*]/g, "\\$&");
