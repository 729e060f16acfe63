"use strict";
// The interactive page of docs: Swagger UI over this daemon's own document.
const shown = { dom_id: "#swagger-ui", deepLinking: true, displayRequestDuration: true, validatorUrl: null };
const file = "openapi.json";

// "Try it out" asks where this page comes from, which may be the sub-path of a proxy that the document does not know.
fetch(file)
  .then((answer) => (answer.ok ? answer.json() : Promise.reject(answer.status)))
  .then((spec) => ({ spec: { ...spec, servers: [{ url: new URL(".", location).href.replace(/\/$/, "") }] } }))
  .catch(() => ({ url: file })) // Swagger UI shows what is wrong
  .then((source) => SwaggerUIBundle({ ...shown, ...source }));
