-- wrk: each request creates one run. Arguments: the load's nonce, the kind of its ids.
local run = require("run")

function init(args)
  run.start(args[1], args[2])
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  local pieces = {}
  run.append(pieces)
  return wrk.format(nil, "/api/v1/runs", nil, table.concat(pieces))
end
