-- What the loads share: thread numbers, the run that is sent, and a summary that a program can read.
local run = {}
local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

-- The text before the event_id, between it and the run_id, and so on. bench/rows.py has the same run.
local BEFORE_ID = '{"event_id":"'
local BEFORE_RUN = '","run_id":"run-'
local BEFORE_AGENT = '","agent_name":"agent-'
local REST = '","job_type":"translate_directory","start_time":"2025-12-24T10:00:00Z",' ..
  '"end_time":"2025-12-24T10:05:00+00:00","status":"success","items_discovered":100,"items_succeeded":98,' ..
  '"items_failed":2,"duration_ms":300000,"metrics_json":{"tokens":12345,"cost":0.25},"host":"worker-7",' ..
  '"environment":"prod","git_repo":"git@github.com:acme/site.git","git_branch":"main",' ..
  '"git_commit_hash":"abcdef1234567","product":"words","trigger_type":"cron"}'

-- Ids are UUIDs: they begin with the time and grow (kind "time-ordered"), or with random digits (kind "random"). The nonce,
-- which is new for each load, the thread's number and a counter make them unique.
function run.start(nonce, kind)
  run.counter = 0
  run.begun_ms = os.time() * 1000
  run.is_ordered = kind == "time-ordered"
  math.randomseed(tonumber(nonce:sub(1, 8), 16) + number) -- wrk's own seed is always the same
  run.suffix = string.format("-8%03x-%s", number, nonce)
end

local function new_id(counter)
  if not run.is_ordered then
    return string.format("%08x-%04x-4%03x%s", math.random(0, 0xffffffff), math.random(0, 0xffff),
      math.random(0, 0xfff), run.suffix)
  end
  local milliseconds, fraction = run.begun_ms + math.floor(counter / 4096), counter % 4096
  return string.format("%08x-%04x-7%03x%s", math.floor(milliseconds / 65536), milliseconds % 65536, fraction, run.suffix)
end

-- Append the pieces of the next run to a list of strings.
function run.append(pieces)
  local counter, size = run.counter + 1, #pieces
  local id = new_id(counter)
  run.counter = counter
  pieces[size + 1] = BEFORE_ID
  pieces[size + 2] = id
  pieces[size + 3] = BEFORE_RUN
  pieces[size + 4] = id
  pieces[size + 5] = BEFORE_AGENT
  pieces[size + 6] = counter % 20
  pieces[size + 7] = REST
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'SUMMARY {"requests":%d,"refused":%d,"broken":%d,"seconds":%.6f,"p50_s":%.6f,"p99_s":%.6f}\n',
    summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end

return run
