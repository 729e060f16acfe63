// Builds elements. Text from runs becomes text nodes and attribute values only, never markup; and characters that
// nobody sees, but that change what others look like, are shown as escapes.

const SVG = "http://www.w3.org/2000/svg";
// Control characters (not tab, newline, carriage return), marks of direction such as U+202E, blanks without width, tags.
const UNSEEN = /([\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]+)/u;
const READ = ["title", "aria-label", "label"]; // attributes that people read

const escaped = (text) => text.split("").map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`).join("");

/** Return a text with escapes in place of what nobody would see. */
export const plain = (text) => text.split(UNSEEN).map((part, index) => (index % 2 ? escaped(part) : part)).join("");

/** Return the same as nodes, in which escapes look different from the text around them. */
export function visible(text) {
  if (!UNSEEN.test(text)) return [text];
  return text.split(UNSEEN).map((part, index) => {
    if (index % 2 === 0) return part;
    const element = document.createElement("span");
    element.className = "escape";
    element.append(escaped(part));
    return element;
  });
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, READ.includes(name) ? plain(String(value)) : value);
    }
  }
  const given = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  element.append(...given.flatMap((child) => (child instanceof Node ? child : visible(String(child)))));
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
  document.getElementById("said").textContent = plain(sentence);
}
