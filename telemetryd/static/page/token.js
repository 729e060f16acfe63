// The daemon's token: asked for when it is needed, and kept until this tab is closed.

import { h } from "./dom.js";

const KEY = `telemetryd-token ${new URL(".", location).pathname}`; // another path may be another daemon's
let asking = null;

/** Return the token, or null if none was given yet. */
export const storedToken = () => sessionStorage.getItem(KEY);

/** Return a token as a header can carry it: its UTF-8 bytes, one character each. */
export const asHeader = (token) => `Bearer ${String.fromCharCode(...new TextEncoder().encode(token))}`;

/** Ask for another token than the one that was refused (null if none was sent); all who ask at once share the answer. */
export function askForToken(refused) {
  if (storedToken() !== refused) return Promise.resolve(); // somebody has asked meanwhile
  asking ??= ask(refused !== null).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(wasWrong) {
  return new Promise((resolve) => {
    const input = h("input", {
      id: "token", name: "token", type: "password", required: true, autocomplete: "off", spellcheck: "false",
      "aria-describedby": "token-hint", "aria-invalid": wasWrong ? "true" : null,
    });
    const form = h(
      "form",
      { on: { submit: accept } },
      h("h2", { id: "token-title" }, "This daemon needs a token"),
      h("p", { id: "token-hint", class: wasWrong ? "problem" : "quiet" }, wasWrong
        ? "That token was refused, or may not read. Check TELEMETRY_API_AUTH_TOKEN or its file, or make one: telemetryd tokens create --name page --scope read"
        : "Enter one with the scope read, or the one in TELEMETRY_API_AUTH_TOKEN. It stays in this tab, and is sent to this daemon only."),
      h("label", { for: "token" }, "Token"),
      input,
      h("div", { class: "actions" }, h("button", { type: "submit", class: "button primary" }, "Sign in")),
    );
    const dialog = h("dialog", { class: "dialog", "aria-labelledby": "token-title", on: { cancel: (event) => event.preventDefault() } }, form);

    function accept(event) {
      event.preventDefault();
      sessionStorage.setItem(KEY, input.value.trim());
      dialog.close();
      dialog.remove();
      resolve();
    }

    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
}
