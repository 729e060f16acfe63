-- wrk: each request creates a batch of runs. Arguments: the load's nonce, the kind of its ids, runs in a batch.
local run = require("run")

function init(args)
  run.start(args[1], args[2])
  size = tonumber(args[3])
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  local pieces = {}
  for position = 1, size do
    pieces[#pieces + 1] = position == 1 and "[" or ","
    run.append(pieces)
  end
  pieces[#pieces + 1] = "]"
  return wrk.format(nil, "/api/v1/runs/batch", nil, table.concat(pieces))
end
