// Builds elements. Text from runs becomes text nodes and attribute values only, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return an HTML element. `properties` are attributes, plus `on`: listeners by event. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Return an SVG element. */
export function s(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** Return a link that leaves the page, or plain text if the address is not http(s). */
export function outside(address, text) {
  if (!/^https?:\/\//i.test(address ?? "")) return text;
  return h("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, text, h("span", { class: "unseen" }, " (new tab)"));
}

/** Tell those who listen to the page instead of looking at it. */
export function say(sentence) {
  document.getElementById("said").textContent = sentence;
}
