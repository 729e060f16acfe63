#!/bin/sh
# Runs telemetryd with the daemon's settings. What the environment already holds counts more than the file.
settings=/etc/telemetryd/telemetryd.env
if [ -r "$settings" ]; then
    given=$(export -p)
    set -a
    . "$settings"
    set +a
    eval "$given"
fi
exec /usr/lib/telemetryd/bin/telemetryd "$@"
