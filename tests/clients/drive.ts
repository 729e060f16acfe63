// Drives every operation with the generated TypeScript client: `node drive.js URL TOKEN PID START_TIME BOOT_ID`.
// tsc checks it against the client's own types.
import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type NewRun = components["schemas"]["NewRun"];

const [url, token, pid, startTime, bootId] = process.argv.slice(2) as [string, string, string, string, string];
const client = createClient<paths>({
  baseUrl: url,
  headers: { Authorization: `Bearer ${token}` },
  // What OpenAPI means where nothing is said; openapi-fetch by itself writes objects in another form.
  querySerializer: { object: { style: "form", explode: true } },
});

/** Return the answer, which must have that status. */
function answered<T>(result: { data?: T; error?: unknown; response: Response }, status = 200): NonNullable<T> {
  assert.equal(result.response.status, status, JSON.stringify(result.error));
  assert(result.data !== undefined && result.data !== null);
  return result.data;
}

/** Return the error, which must have that status. */
function refused<T>(result: { error?: T; response: Response }, status: number): NonNullable<T> {
  assert.equal(result.response.status, status);
  assert(result.error !== undefined && result.error !== null);
  return result.error;
}

function newRun(event_id: string, status: components["schemas"]["Status"] = "running"): NewRun {
  return {
    event_id,
    run_id: `run of ${event_id}`,
    agent_name: "typescript",
    job_type: "drive",
    start_time: "2025-12-24T10:00:00Z",
    created_at: null, // as a form with an empty field has it
    status,
    metrics_json: { tokens: 48211, nested: { any: ["thing"] } },
    git_repo: "https://github.com/acme/tool.git",
  };
}

const inPath = (event_id: string) => ({ params: { path: { event_id } } });

async function writeRuns() {
  const created = answered(await client.POST("/api/v1/runs", { body: newRun("ts-1") }), 201);
  assert.deepEqual(created, { status: "created", event_id: "ts-1", run_id: "run of ts-1" });
  const known = answered(await client.POST("/api/v1/runs", { body: newRun("ts-1") }));
  assert(known.status === "duplicate" && known.message);
  const nameless = refused(await client.POST("/api/v1/runs", { body: newRun(" ") }), 422);
  assert(typeof nameless.detail !== "string");
  assert.deepEqual(nameless.detail[0]?.loc, ["body", "event_id"]);
  // @ts-expect-error a field whose name is wrong, and a value that is none
  const wrong: NewRun = { ...newRun("ts-0"), job_kind: "drive", status: "done" };
  assert(wrong);

  const array = [newRun("ts-1"), newRun("ts-2", "failure"), newRun(" ")];
  const stored = answered(await client.POST("/api/v1/runs/batch", { body: array }));
  assert.deepEqual([stored.inserted, stored.duplicates, stored.total], [1, 1, 3]);
  assert.deepEqual(stored.error_details?.[0]?.detail[0]?.loc, ["body", 2, "event_id"]);
  const wrapped = await client.POST("/api/v1/runs/batch", { body: { runs: [newRun("ts-3", "timeout")] } });
  assert.equal(answered(wrapped).inserted, 1);
  const lines = await client.POST("/api/v1/runs/batch", {
    body: `${JSON.stringify(newRun("ts-3"))}\n`,
    bodySerializer: (body) => body as string,
    headers: { "Content-Type": "application/x-ndjson" },
  });
  assert.equal(answered(lines).duplicates, 1);

  const updated = answered(
    await client.PATCH("/api/v1/runs/{event_id}", {
      ...inPath("ts-1"),
      body: { status: "success", items_succeeded: 7, end_time: new Date().toISOString(), context_json: { a: 1 } },
    }),
  );
  assert.deepEqual(updated.fields_updated.sort(), ["context_json", "end_time", "items_succeeded", "status"]);
  const commit = await client.POST("/api/v1/runs/{event_id}/associate-commit", {
    ...inPath("ts-1"),
    body: { commit_hash: "3f2a91c", commit_source: "llm" },
  });
  assert.equal(answered(commit).run_id, "run of ts-1");

  const one = { event_type: "page", event_key: "page-17", payload: { page: 17 } };
  const events = "/api/v1/runs/{event_id}/events" as const;
  assert.equal(answered(await client.POST(events, { ...inPath("ts-1"), body: one }), 201).inserted, 1);
  const several = [one, { event_type: "page", event_key: "page-18", timestamp: "2025-12-24T10:00:00Z" }];
  const more = answered(await client.POST(events, { ...inPath("ts-1"), body: several }), 201);
  assert.deepEqual([more.inserted, more.duplicates], [1, 1]);
}

async function readRuns() {
  const missing = refused(await client.GET("/api/v1/runs/{event_id}", inPath("none")), 404);
  assert.equal(missing.detail, "Run not found: none");
  const run = answered(
    await client.GET("/api/v1/runs/{event_id}", {
      params: { path: { event_id: "ts-1" }, query: { include: "events" } },
    }),
  );
  assert.deepEqual([run.status, run.git_commit_source, run.items_succeeded], ["success", "llm", 7]);
  assert.equal(run.metrics_json?.["tokens"], 48211);
  assert.deepEqual(run.events?.map((event) => event.event_key).sort(), ["page-17", "page-18"]);

  const page = await client.GET("/api/v1/runs", {
    params: { query: { agent_name: "type*", status: "failure,timeout", count: "exact", limit: 1 } },
  });
  assert.deepEqual(answered(page).map((each) => each.event_id), ["ts-3"]);
  assert.equal(page.response.headers.get("X-Total-Count"), "2");
  assert.match(page.response.headers.get("Link") ?? "", /rel="next"/);
  const short = answered(await client.GET("/api/v1/runs", { params: { query: { fields: "event_id,status" } } }));
  assert.deepEqual(short.map((each) => [each.event_id, each.run_id]), [
    ["ts-3", undefined],
    ["ts-2", undefined],
    ["ts-1", undefined],
  ]);
  for (const [metrics, found] of [
    [{ "metrics.tokens": "48211" }, 3],
    [{ "metrics.tokens>": "48212" }, 0],
  ] as const) {
    const matching = answered(await client.GET("/api/v1/runs", { params: { query: { metrics } } }));
    assert.equal(matching.length, found, JSON.stringify(metrics));
  }
  const wrong = refused(await client.GET("/api/v1/runs", { params: { query: { status: "nope" } } }), 400);
  assert.match(wrong.detail, /^Invalid status/);

  const events = answered(await client.GET("/api/v1/runs/{event_id}/events", inPath("ts-1")));
  assert.deepEqual(events.map((event) => event.event_key), ["page-18", "page-17"]);
  const commit = answered(await client.GET("/api/v1/runs/{event_id}/commit-url", inPath("ts-1")));
  assert.equal(commit.commit_url, "https://github.com/acme/tool/commit/3f2a91c");
  assert(answered(await client.GET("/api/v1/runs/{event_id}/repo-url", inPath("ts-1"))).repo_url);
  const exported = await client.GET("/api/v1/runs/export", { parseAs: "text" });
  assert.equal(answered(exported).trimEnd().split("\n").length, 3);
  assert.equal(exported.response.headers.get("Telemetry-Snapshot"), "exact");
  const table = await client.GET("/api/v1/runs/export", {
    params: { query: { format: "csv", status: "timeout" } },
    parseAs: "text",
  });
  assert.deepEqual(answered(table).trimEnd().split(/\r?\n/).map((line) => line.split(",")[1]), ["event_id", '"ts-3"']);

  const changes = answered(await client.GET("/api/v1/changes", { params: { query: { events_after: 0 } } }));
  const runs = changes.changes.flatMap((change) => ("run" in change ? [change.run.event_id] : []));
  assert.deepEqual(runs.sort(), ["ts-1", "ts-2", "ts-3"]);
  assert.equal(changes.events?.length, 2);

  const stop = new AbortController();
  const stream = await client.GET("/api/v1/runs/stream", {
    params: { query: { after: "0" } },
    parseAs: "stream",
    signal: stop.signal,
  });
  let text = "";
  for await (const piece of answered(stream) as unknown as AsyncIterable<Uint8Array>) {
    text += Buffer.from(piece).toString();
    if (/^data: \{.*\n/m.test(text)) break;
  }
  stop.abort();
  assert.match(text, /"agent_name":"typescript"/);
}

async function readFigures() {
  const query = { group_by: "agent_name,status", status: "failure" };
  const stats = answered(await client.GET("/api/v1/stats", { params: { query } }));
  assert.deepEqual(stats.groups.map((group) => [group.agent_name, group.runs]), [["typescript", 1]]);
  assert.deepEqual(answered(await client.GET("/api/v1/regressions")).regressions, []);
  assert.deepEqual(answered(await client.GET("/api/v1/alerts")).rules, []);
  assert.deepEqual(answered(await client.GET("/api/v1/metadata")).agent_names, ["typescript"]);
  assert.equal(answered(await client.GET("/health")).status, "ok");
  const totals = answered(await client.GET("/metrics", { headers: { Accept: "application/json" } }));
  assert(typeof totals !== "string");
  assert.deepEqual([totals.agents["typescript"], totals.performance.synchronous], [3, "FULL"]);
  const prometheus = await client.GET("/metrics", { params: { query: { format: "prometheus" } }, parseAs: "text" });
  assert.match(String(answered(prometheus)), /telemetryd_runs/);
}

async function administer() {
  answered(await client.POST("/api/v1/runs", { body: newRun("ts-4") }), 201);
  const process = { pid: Number(pid), start_time: Number(startTime), boot_id: bootId };
  const watched = await client.POST("/api/v1/runs/{event_id}/process", { ...inPath("ts-4"), body: process });
  assert.equal(answered(watched, 201).pid, process.pid);
  const created_before = "2125-01-01T00:00:00Z";
  const counted = await client.POST("/api/v1/admin/reap", { body: { created_before, dry_run: true } });
  assert.equal(answered(counted).matching, 1);
  const reaped = answered(await client.POST("/api/v1/admin/reap", { body: { created_before } }));
  assert.deepEqual([reaped.reaped, reaped.more], [1, false]);
  const pruned = await client.POST("/api/v1/admin/prune", { body: { created_before, status: "failure" } });
  assert.equal(answered(pruned).pruned, 1);
  refused(await client.POST("/api/v1/admin/prune", { body: { created_before, older_than: "90d" } }), 422);
  const allowed = await client.POST("/api/v1/admin/confirm", { body: { prune_after: "90d" } });
  assert.equal(answered(allowed).prune_after, "90d");
  assert.equal(answered(await client.POST("/api/v1/admin/backup", { body: {} })).rows, 3);
}

await writeRuns();
await readRuns();
await readFigures();
await administer();
