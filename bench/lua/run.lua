-- What the loads share: thread numbers, the run that is sent, and a summary that a program can read.
local run = {}
local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

-- The text before the event_id, between it and the run_id's number, and so on. bench/rows.py has the same run.
local BEFORE_ID = '{"event_id":"'
local BEFORE_RUN = '","run_id":"20251231T153045Z-hugo-translator-'
local BEFORE_AGENT = '","agent_name":"agent-'
local REST = '","job_type":"translate_directory","start_time":"2025-12-24T10:00:00Z",' ..
  '"end_time":"2025-12-24T10:05:00+00:00","status":"success","items_discovered":100,"items_succeeded":98,' ..
  '"items_failed":2,"duration_ms":300000,"metrics_json":{"tokens":12345,"cost":0.25},"host":"worker-7",' ..
  '"environment":"prod","git_repo":"git@github.com:acme/site.git","git_branch":"main",' ..
  '"git_commit_hash":"abcdef1234567","product":"words","trigger_type":"cron"}'

-- Ids begin with random digits, so that each one dirties another page of the index; the nonce, which is new for
-- each load, the thread's number and a counter make them unique.
function run.start(nonce)
  run.counter = 0
  run.infix = string.format("-%s-%d-", nonce, number)
end

-- Append the pieces of the next run to a list of strings.
function run.append(pieces)
  local counter, size = run.counter + 1, #pieces
  run.counter = counter
  pieces[size + 1] = BEFORE_ID
  pieces[size + 2] = string.format("%08x", math.random(0, 0xffffffff))
  pieces[size + 3] = run.infix
  pieces[size + 4] = counter
  pieces[size + 5] = BEFORE_RUN
  pieces[size + 6] = counter
  pieces[size + 7] = BEFORE_AGENT
  pieces[size + 8] = counter % 20
  pieces[size + 9] = REST
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'SUMMARY {"requests":%d,"refused":%d,"broken":%d,"seconds":%.6f,"p50_s":%.6f,"p99_s":%.6f}\n',
    summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end

return run
