from __future__ import annotations

import configparser
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
import yaml
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings, variable
from tests.conftest import Api, StartDaemon, make_run
from tests.http_client import call

ROOT = Path(__file__).parents[1]


def exposed_names() -> set[str]:
    metrics = Metrics()
    for labelled in vars(metrics).values():
        if isinstance(labelled, Histogram) and labelled._labelnames:
            labelled.labels(*labelled._labelnames).observe(1)
    metrics.requests.labels("GET", "/", 200)
    text = metrics.expose("text/plain", 0)[0].decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.mark.parametrize("file", ["prometheus/alerts.yml", "grafana/telemetryd.json"])
def test_every_metric_of_the_examples_exists(file: str) -> None:
    text = (ROOT / "examples" / file).read_text()
    used = set(re.findall(r"\b(?:telemetryd|process)_[a-z_]+\b", text))
    assert len(used) > 5
    assert used <= exposed_names()


@pytest.mark.parametrize("file", ["telemetryd.json", "runs.json"])
def test_the_dashboard_is_json_and_its_panels_do_not_overlap(file: str) -> None:
    dashboard = json.loads((ROOT / "examples/grafana" / file).read_text())
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


async def test_every_query_of_the_dashboard_of_runs_is_answered_with_its_columns(api: Api) -> None:
    """The Infinity data source asks for these addresses, and takes these paths from each group of the answer."""
    await api.post(make_run(status="success", duration_ms=1200, items_failed=1))
    dashboard = json.loads((ROOT / "examples/grafana/runs.json").read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    places = {
        "${__from:date:iso}": "2025-01-01T00:00:00.000Z",
        "${__to:date:iso}": "2099-01-01T00:00:00.000Z",
        "${agent:text}": variables["agent"]["current"]["value"],
    }
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) == 9
    for target, bucket in itertools.product(targets, variables["bucket"]["query"].split(",")):
        url = target["url"].replace("${bucket}", bucket)
        for name, value in places.items():
            url = url.replace(name, value)
        [group] = (await api.get(url))[target["root_selector"]]
        for column in target["columns"]:
            value = functools.reduce(lambda found, name: found[name], column["selector"].split("."), group)
            assert isinstance(value, int | float if column["type"] == "number" else str), column


def test_prometheus_needs_no_token_for_what_is_served_without_one() -> None:
    config = yaml.safe_load((ROOT / "examples/prometheus/scrape.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["params"] == {"format": ["prometheus"]}
    assert job.keys() == {"job_name", "metrics_path", "params", "static_configs"}


@pytest.mark.parametrize("file", ["Dockerfile", "compose.yaml", "compose.cluster.yaml", "telemetryd.service"])
def test_every_variable_of_the_deployment_files_is_a_setting(file: str) -> None:
    used = set(re.findall(r"\bTELEMETRY_[A-Z_]+[A-Z]\b", (ROOT / file).read_text()))
    assert used
    assert used <= {variable(name) for name in Settings.model_fields}


def test_lnav_knows_the_lines_of_the_log(start_daemon: StartDaemon) -> None:
    [(name, known)] = [
        (name, value)
        for name, value in json.loads((ROOT / "examples/lnav/telemetryd.json").read_text()).items()
        if name != "$schema"
    ]
    assert re.fullmatch(r"\w+", name)
    daemon = start_daemon()
    for path in ("/api/v1/metadata", "/api/v1/runs?metrics.a>5&host=h", "/nope", "/api/v1/runs?limit=x"):
        call(daemon.url, "GET", path)
    assert daemon.stop() == 0
    for line in daemon.lines:
        assert line[known["level-field"]] in known["level"].values()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line[known["timestamp-field"]])
        assert line[known["body-field"]]
    requests = [line for line in daemon.lines if "endpoint" in line]
    assert len(requests) == 4
    for line in requests:
        assert line.keys() - known["value"].keys() <= {"timestamp", "level", "path"}
        assert line["client"] == "127.0.0.1"


def test_the_build_context_holds_what_the_image_is_built_from(tmp_path: Path) -> None:
    """`COPY . .` brings what .dockerignore lets through, and no more."""
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    required = re.search(r"--requirement (\S+)", (ROOT / "Dockerfile").read_text())
    assert required is not None
    assert required[1] in let_through
    for name in let_through:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    listed = configparser.ConfigParser()
    listed.read(tmp_path / "setup.cfg")
    folders = dict(line.split(" = ") for line in listed["options"]["package_dir"].split("\n") if line)
    for package in listed["options"]["packages"].split():
        assert (tmp_path / folders.get(package, package.replace(".", "/")) / "__init__.py").is_file()


def test_the_health_check_of_the_image_sees_the_daemon(start_daemon: StartDaemon, tmp_path: Path) -> None:
    command = json.loads(re.search(r"HEALTHCHECK.*?CMD (\[.*?\])\n", (ROOT / "Dockerfile").read_text(), re.S)[1])  # type: ignore[index]
    assert command[0] == "python"
    (cert := tmp_path / "cert.pem").touch(0o600)
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(cert))
    for variables in ({}, {"TELEMETRY_TLS_CERT": str(cert)}):
        daemon = start_daemon(**variables)
        port = daemon.url.rpartition(":")[2]
        environment = {"TELEMETRY_API_PORT": port, "TELEMETRY_DB_PATH": str(daemon.database), **variables}

        def probe(environment: dict[str, str] = environment) -> int:
            probing = [sys.executable, *command[1:]]
            return subprocess.run(probing, env=environment, stderr=subprocess.DEVNULL, check=False).returncode

        assert probe() == 0
        daemon.stop()
        assert probe() != 0
