// Light or dark: what the system says, unless the reader has chosen; the choice is kept in this browser.

import { s } from "./dom.js";

const KEY = "telemetryd-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");
const SUN = "M8 5a3 3 0 1 0 0 6a3 3 0 1 0 0-6M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1";
const MOON = "M13.5 9.8A6 6 0 0 1 6.2 2.5a6 6 0 1 0 7.3 7.3z";

const current = () => localStorage.getItem(KEY) ?? (dark.matches ? "dark" : "light");

function show() {
  const theme = current();
  const other = theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  button.setAttribute("aria-label", `Change to the ${other} theme`);
  button.title = `Change to the ${other} theme (t)`;
  button.replaceChildren(s("svg", { viewBox: "0 0 16 16", class: "shape", "aria-hidden": "true" }, s("path", { d: theme === "dark" ? SUN : MOON })));
}

/** Change to the other theme. */
export function toggle() {
  localStorage.setItem(KEY, current() === "dark" ? "light" : "dark");
  show();
}

dark.addEventListener("change", show);
button.addEventListener("click", toggle);
show();
