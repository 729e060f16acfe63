-- wrk: each request ends one of the seeded runs. Arguments: the load's nonce, how many seeded runs there are.
require("run")

function init(args)
  counter = 0
  nonce = args[1]
  seeded = tonumber(args[2])
  wrk.method = "PATCH"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  local n = counter % seeded + 1
  counter = counter + 1
  -- The same id as in bench/seeding.py; the product stays below 2^53 up to three million runs.
  local path = string.format("/api/v1/runs/%08x-seed-%d", (n * 2654435761) % 4294967296, n)
  local body = string.format('{"status":"success","end_time":"2025-12-24T10:05:00Z","duration_ms":300000,' ..
    '"items_succeeded":%d,"output_summary":"%s-%d"}', counter, nonce, counter)
  return wrk.format(nil, path, nil, body)
end
