-- wrk: each request creates one run. Argument: the load's nonce.
local run = require("run")

function init(args)
  run.start(args[1])
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  local pieces = {}
  run.append(pieces)
  return wrk.format(nil, "/api/v1/runs", nil, table.concat(pieces))
end
