-- wrk: each request creates one run with an event_id of its own (thread, counter and start time make it).
local thread_count = 0
function setup(thread)
  thread:set("number", thread_count)
  thread_count = thread_count + 1
end
function init(args)
  counter = 0
  prefix = string.format("%s-%d-", args[1] or "bench", number)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end
function request()
  counter = counter + 1
  local body = string.format('{"event_id":"%08x-%s%d","run_id":"20251231T153045Z-hugo-translator-%08d",' ..
    '"agent_name":"agent-%d","job_type":"translate_directory","start_time":"2025-12-24T10:00:00Z",' ..
    '"end_time":"2025-12-24T10:05:00+00:00","status":"success","items_discovered":100,"items_succeeded":98,' ..
    '"items_failed":2,"duration_ms":300000,"metrics_json":{"tokens":12345,"cost":0.25},"host":"worker-7",' ..
    '"environment":"prod","git_repo":"git@github.com:acme/site.git","git_branch":"main",' ..
    '"git_commit_hash":"abcdef1234567","product":"words","trigger_type":"cron"}',
    math.random(0, 0xffffffff), prefix, counter, counter, counter % 20)
  return wrk.format(nil, "/api/v1/runs", nil, body)
end
