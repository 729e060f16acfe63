-- wrk: the address on the command line, again and again.
require("run")
