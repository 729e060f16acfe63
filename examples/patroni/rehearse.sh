#!/usr/bin/env bash
# Rehearses a failover on one machine: three PostgreSQL servers under Patroni by the files next to this one, two daemons, and
# the README's walk-through at either. Kills the primary while runs come in, and looks for each that was acknowledged.
#
# As root on Debian: apt-get install postgresql-15 etcd-server python3-venv curl && examples/patroni/rehearse.sh NEW_FOLDER
set -euo pipefail
shopt -s inherit_errexit
here=$(dirname "$(readlink -f "$0")")
folder=$1
password=rehearsal
first=25431
daemons=(28765 28766)

say() { printf '\n### %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@" 2>&1; }
until_true() { for _ in $(seq 300); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done; echo "not in time: $*"; exit 1; }
cluster() { curl -sf "http://127.0.0.1:$((first + 100))/cluster" || curl -sf "http://127.0.0.1:$((first + 101))/cluster"; }
leader() { cluster | grep -o '"name": "db[0-9]", "role": "leader", "state": "running"' | grep -o 'db[0-9]'; }
is_whole() { [ "$(cluster | grep -oE '"state": "(running|streaming)"' | wc -l)" = 3 ] && cluster | grep -q quorum_standby; }
processes() { for one in /proc/[0-9]*; do [[ $(readlink "$one/cwd") == "$folder/$1"* ]] && echo "${one#/proc/}"; done; }
kill_server() { while kill -9 $(processes "$1") 2>/dev/null; do sleep 0.1; done; }
end() { touch over; for name in db1 db2 db3 etcd daemons; do kill_server $name; done; }

install -d -m 755 "$folder" "$folder/etcd" "$folder/daemons"
cd "$folder"
trap end EXIT

say "What is installed"
run /usr/lib/postgresql/15/bin/postgres --version
run etcd --version | head -2
/usr/bin/python3 -m venv patroni
patroni/bin/pip install --quiet --disable-pip-version-check 2>/dev/null 'patroni[etcd3,psycopg3]>=4.1,<5'
/usr/bin/python3 -m venv telemetryd
telemetryd/bin/pip install --quiet --disable-pip-version-check 2>/dev/null "$here/../..[postgresql]"
run patroni/bin/patroni --version
run telemetryd/bin/telemetryd --version

say "etcd, and three servers by patroni.yml and db1.env with the places of this machine"
sed "s#/var/run/postgresql#$folder#" "$here/patroni.yml" >patroni.yml
chmod 777 .
(cd etcd && exec etcd --data-dir data --listen-client-urls http://127.0.0.1:$((first + 200)) \
    --advertise-client-urls http://127.0.0.1:$((first + 200)) --listen-peer-urls http://127.0.0.1:$((first + 201)) \
    --initial-advertise-peer-urls http://127.0.0.1:$((first + 201)) \
    --initial-cluster default=http://127.0.0.1:$((first + 201)) >log 2>&1) &
disown # else the shell tells of each that is killed
start_server() {
    local number=${1#db} place
    place=127.0.0.1:$((first + number - 1))
    install -d -o postgres -m 700 "$1"
    sed -e "s/^PATRONI_NAME=.*/PATRONI_NAME=$1/" -e "s/^\(PATRONI_ETCD3_HOSTS\)=.*/\1=127.0.0.1:$((first + 200))/" \
        -e "s/^\(PATRONI_RESTAPI_[A-Z_]*\)=.*/\1=127.0.0.1:$((first + 99 + number))/" \
        -e "s/^\(PATRONI_POSTGRESQL_LISTEN\|PATRONI_POSTGRESQL_CONNECT_ADDRESS\)=.*/\1=$place/" \
        -e "s#^\(PATRONI_POSTGRESQL_DATA_DIR\)=.*#\1=$folder/$1/data#" -e "s#^\(PATRONI_POSTGRESQL_PGPASS\)=.*#\1=$folder/$1/pgpass#" \
        -e "s/PASSWORD=.*/PASSWORD=$password/" "$here/db1.env" >"$1.env"
    (cd "$1" && set -a && . "../$1.env" && exec setpriv --reuid=postgres --regid=postgres --init-groups \
        "$folder/patroni/bin/python" -m patroni "$folder/patroni.yml" >>"../$1.log" 2>&1) &
    disown
}
start_server db1
until_true leader
start_server db2
start_server db3
until_true is_whole
run patroni/bin/patronictl -d "etcd3://127.0.0.1:$((first + 200))" list telemetry

say "The database and its user"
hosts=127.0.0.1:$first,127.0.0.1:$((first + 1)),127.0.0.1:$((first + 2))
sql() { PGPASSWORD=$password psql -qAt "postgresql://$1@$hosts/$2?target_session_attrs=read-write" -c "$3"; }
sql postgres postgres "CREATE ROLE telemetryd LOGIN PASSWORD '$password'"
sql postgres postgres "CREATE DATABASE telemetry OWNER telemetryd ENCODING 'UTF8' TEMPLATE template0"

say "Two daemons, by one variable"
export TELEMETRY_DB_URL="postgresql://telemetryd:$password@$hosts/telemetry"
echo "$ export TELEMETRY_DB_URL=postgresql://telemetryd:…@$hosts/telemetry"
for port in "${daemons[@]}"; do
    echo "$ TELEMETRY_API_PORT=$port telemetryd serve &"
    (cd daemons && TELEMETRY_API_PORT=$port exec ../telemetryd/bin/telemetryd serve >>$port.log 2>&1) &
    disown
done
for port in "${daemons[@]}"; do until_true curl -sf "http://127.0.0.1:$port/health"; done

sed -n '/^## Walk-through/,/^## From Python/p' "$here/../../README.md" | sed -n '/^```bash$/,/^```$/{/^```/!p}' >walk-through.sh
sed -n '/^## From Python/,/^## /p' "$here/../../README.md" | sed -n '/^```python$/,/^```$/{/^```/!p;/^```$/q}' >from_python.py
for port in "${daemons[@]}"; do
    say "The README's walk-through at the daemon on port $port"
    export TELEMETRY_API_PORT=$port
    bash -c "set -e; curl() { command curl -sS --fail-with-body \"\$@\"; echo; }; set -v; . ./walk-through.sh" 2>&1 | cut -c1-400
    TELEMETRY_BUFFER_DIR=$folder/spool telemetryd/bin/python from_python.py
    unset TELEMETRY_API_PORT
done
say "What the Python client has sent through either"
run curl -sS "http://127.0.0.1:${daemons[0]}/api/v1/runs?agent_name=hugo-translator&fields=agent_name,status,items_succeeded"

say "Runs come in at both; what is not acknowledged is repeated at the other one"
cat >send.sh <<'SEND'
for number in $(seq 1 100000); do
    [ -e over ] && exit
    body="{\"event_id\":\"$1-$number\",\"run_id\":\"$1-$number\",\"agent_name\":\"rehearsal\",\"job_type\":\"$1\",\"start_time\":\"2026-01-01T00:00:00Z\"}"
    port=$2; other=$3
    until status=$(curl -s -m 60 -o /dev/null -w '%{http_code}' -H 'Content-Type: application/json' -d "$body" "http://127.0.0.1:$port/api/v1/runs") && [[ $status = 20[01] ]]; do
        echo "$(date +%T.%3N) $1-$number $status" >>"refused-$1"
        swap=$port; port=$other; other=$swap
        sleep 0.2
    done
    echo "$1-$number" >>"acknowledged-$1"
done
SEND
touch acknowledged-one acknowledged-two refused-one refused-two
bash send.sh one "${daemons[@]}" &
one=$!
bash send.sh two "${daemons[1]}" "${daemons[0]}" &
two=$!
sleep 5
count() { cat acknowledged-* | wc -l; }
echo "acknowledged until now: $(count)"

say "The primary's machine dies"
old=$(leader)
killed=$(date +%s%N)
echo "$ kill -9 (Patroni and every process of PostgreSQL of $old)"
kill_server "$old"
sleep 0.5 # what was answered already
before=$(count)
sleep 3
for port in "${daemons[@]}"; do echo "$ curl http://127.0.0.1:$port/health"; curl -sS "http://127.0.0.1:$port/health" | grep -oE '"(status|error|problem|message)":("[^"]*"|null)' | head -3; done
echo "acknowledged in three seconds: $(($(count) - before))"
after=$(count)
until [ "$(count)" -gt "$((after + 20))" ]; do sleep 0.1; done
echo "acknowledged again $((($(date +%s%N) - killed) / 1000000000)) s after the kill"
until_true leader
run patroni/bin/patronictl -d "etcd3://127.0.0.1:$((first + 200))" list telemetry
for port in "${daemons[@]}"; do until_true curl -sf "http://127.0.0.1:$port/health"; done
sleep 3

say "The machine comes back, as a standby"
start_server "$old"
until_true is_whole
run patroni/bin/patronictl -d "etcd3://127.0.0.1:$((first + 200))" list telemetry
sleep 2
touch over
wait $one $two

say "Every acknowledged run is there, once"
sort -u acknowledged-* >acknowledged
sql telemetryd telemetry "SELECT event_id FROM agent_runs WHERE agent_name = 'rehearsal'" | sort >stored
echo "acknowledged:            $(wc -l <acknowledged)"
echo "refused, then repeated:  $(cat refused-* | wc -l)"
echo "acknowledged and lost:   $(comm -23 acknowledged stored | wc -l)"
echo "stored twice:            $(uniq -d stored | wc -l)"
echo "stored, not acknowledged: $(comm -13 acknowledged stored | wc -l)"
for port in "${daemons[@]}"; do
    run curl -sS "http://127.0.0.1:$port/api/v1/runs/translate-2025-12-24-001" | cut -c1-330
done
run telemetryd/bin/telemetryd check
[ "$(comm -23 acknowledged stored | wc -l)" = 0 ] && [ "$(uniq -d stored | wc -l)" = 0 ]
