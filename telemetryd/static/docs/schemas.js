// Shows JSON schemas: what a value may be in a few words, and the fields of an object as a table that opens level by level.

import { h } from "../../page/dom.js";

const resolved = (spec, schema) => (schema.$ref ? spec.components.schemas[schema.$ref.split("/").at(-1)] : schema);
const named = (schema) => schema.$ref?.split("/").at(-1);

/** Return what a value may be, in a few words. */
export function typeOf(spec, schema = {}) {
  if (named(schema) && resolved(spec, schema).properties) return named(schema);
  const plain = resolved(spec, schema);
  const variants = plain.anyOf ?? plain.oneOf;
  if (variants) return [...new Set(variants.map((one) => typeOf(spec, one)))].join(" or ");
  if (plain.const !== undefined) return JSON.stringify(plain.const);
  if (plain.enum) return plain.enum.map((one) => JSON.stringify(one)).join(" or ");
  if (plain.type === "array") return `array of ${typeOf(spec, plain.items)}`;
  return [plain.type ?? "any", plain.format ? ` (${plain.format})` : ""].join("");
}

/** Return the schemas with fields that a value may have, each once. */
function objects(spec, schema = {}) {
  const plain = resolved(spec, schema);
  if (plain.properties) return [[named(schema) ?? "object", plain]];
  const inner = [...(plain.anyOf ?? plain.oneOf ?? []), plain.items, plain.additionalProperties].filter((one) => one && typeof one === "object");
  return inner.flatMap((one) => objects(spec, one));
}

function limits(schema) {
  const words = { minLength: "at least %s characters", maxLength: "at most %s characters", minimum: "from %s", maximum: "up to %s", maxItems: "at most %s items", maxProperties: "at most %s keys" };
  const shown = Object.entries(words).filter(([name]) => schema[name] !== undefined).map(([name, text]) => text.replace("%s", schema[name]));
  return shown.length ? ` (${shown.join(", ")})` : "";
}

function fields(spec, schema) {
  const required = new Set(schema.required ?? []);
  const lines = Object.entries(schema.properties).map(([name, field]) =>
    h("tr", {},
      h("th", { scope: "row" }, h("code", {}, name), required.has(name) ? h("span", { class: "required" }, " required") : null),
      h("td", {}, h("code", {}, typeOf(spec, field))),
      h("td", {}, field.description ?? "", h("span", { class: "quiet" }, limits(resolved(spec, field))), objects(spec, field).map((inner) => nested(spec, inner)))));
  return h("div", { class: "wide" }, h("table", {}, h("tbody", {}, lines)));
}

/** Return one kind of object, closed: its fields are built when it is opened, as a schema may hold itself. */
function nested(spec, [name, schema]) {
  const details = h("details", { class: "schema" }, h("summary", {}, h("code", {}, name)));
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(fields(spec, schema));
  });
  return details;
}

/** Return a schema as its type, with the fields of its objects to be opened. */
export function schemaView(spec, schema) {
  const kinds = objects(spec, schema);
  return kinds.length ? kinds.map((kind) => nested(spec, kind)) : h("code", {}, typeOf(spec, schema));
}
