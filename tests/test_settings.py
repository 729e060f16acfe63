from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from telemetryd.cli import main
from telemetryd.cli.options import load_for
from telemetryd.client.config import VARIABLES
from telemetryd.client.old_variables import WITHOUT_EFFECT
from telemetryd.configuration import LoadedSettings, Origin, load
from telemetryd.errors import ConfigurationError
from telemetryd.settings import OF_POSTGRES, Settings, variable
from tests.tools.process import telemetryd

TOKEN = "correct-horse-battery-staple"
GUIDE_DOTENV = """\
# Telemetry API Configuration
TELEMETRY_DB_PATH=D:/agent-metrics/db/telemetry.sqlite
TELEMETRY_LOCK_FILE=D:/agent-metrics/db/telemetry.lock

# Database PRAGMA Settings
TELEMETRY_DB_JOURNAL_MODE=DELETE
TELEMETRY_DB_SYNCHRONOUS=FULL

# API Server Settings
TELEMETRY_API_HOST=0.0.0.0
TELEMETRY_API_PORT=8765
TELEMETRY_API_WORKERS=1  # CRITICAL: Must be 1

# Logging
TELEMETRY_LOG_LEVEL=INFO
"""


def loaded(environment: dict[str, str] | None = None, dotenv: Path | None = None, **flags: Any) -> LoadedSettings:
    return load(flags, environment or {}, dotenv)


def problems(environment: dict[str, str], **flags: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        loaded(environment, **flags)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


# --- Values --------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_guide_and_the_contract() -> None:
    settings = loaded().settings
    assert settings.model_dump(mode="json", exclude={"db_path"}) == {
        "lock_file": None,
        "db_journal_mode": "DELETE",
        "db_synchronous": "FULL",
        "db_busy_timeout_ms": 30_000,
        "db_readers": 4,
        "db_url": None,
        "db_password_file": None,
        "db_schema": "public",
        "db_sync": None,
        "db_commit_timeout_s": 30.0,
        "db_poll_ms": 200,
        "query_timeout_s": 10.0,
        "api_host": "0.0.0.0",
        "api_port": 8765,
        "api_unix": None,
        "api_workers": 1,
        "api_auth_enabled": False,
        "api_auth_token": None,
        "api_auth_token_file": None,
        "tokens_file": None,
        "api_protected_mode": True,
        "tls_cert": None,
        "tls_key": None,
        "tls_client_ca": None,
        "allowed_hosts": None,
        "cors_origins": None,
        "rate_limit_enabled": False,
        "rate_limit_rpm": 60,
        "quota_runs_per_minute": None,
        "quota_bytes_per_day": None,
        "queue_max": 10_000,
        "commit_target_ms": 100,
        "max_body_bytes": 16_777_216,
        "max_batch": 10_000,
        "min_free_mb": 64,
        "prune_after": None,
        "stale_after": None,
        "full_text": False,
        "death_certificates": True,
        "watched_processes": 4096,
        "alerts_file": None,
        "backup_dir": None,
        "backup_keep": None,
        "shutdown_timeout_s": 10.0,
        "log_level": "INFO",
        "log_format": "auto",
    }
    assert settings.durable


def test_the_database_is_in_the_state_directory_under_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert loaded().settings.db_path == Path("data/telemetry.sqlite")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/telemetryd:/var/lib/other")
    assert loaded().settings.db_path == Path("/var/lib/telemetryd/telemetry.sqlite")


def test_the_guides_dotenv_file_is_understood_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(GUIDE_DOTENV)
    found = loaded(dotenv=tmp_path / ".env")
    assert str(found.settings.db_path) == "D:/agent-metrics/db/telemetry.sqlite"
    assert str(found.settings.lock_file) == "D:/agent-metrics/db/telemetry.lock"
    assert found.settings.api_workers == 1
    assert [name for name, origin in found.origins.items() if origin is Origin.DOTENV] == [
        "db_path", "lock_file", "db_journal_mode", "db_synchronous", "api_host", "api_port", "api_workers", "log_level",
    ]  # fmt: skip
    (remark,) = found.remarks
    assert remark.startswith("TELEMETRY_DB_PATH=D:/agent-metrics/db/telemetry.sqlite is a Windows path; here it")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_flag_beats_the_environment_which_beats_dotenv_which_beats_the_default(name: str, tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    four = {
        "db_journal_mode": ["wal", "TRUNCATE", "PERSIST"],
        "db_synchronous": ["normal", "EXTRA", "NORMAL"],
        "log_level": ["debug", "WARNING", "ERROR"],
        "log_format": ["text", "json", "text"],
        "api_workers": ["1", "1", "1"],
        "prune_after": ["1.5s", "36h", "90d"],
        "stale_after": ["1.5s", "2.5s", "3.5s"],
        "backup_keep": ["1", "2", "3"],
        "db_url": ["postgresql://a", "postgres://b/c", "postgresql://d@e,f/g"],
        "db_schema": ["a", "b", "c"],
        "db_sync": ["standby", "local", "none"],
        "quota_runs_per_minute": ["1", "2", "3"],
        "quota_bytes_per_day": ["1", "2", "3"],
        "cors_origins": ["http://a", "http://b", "http://c"],
    }
    by_type: dict[object, list[str]] = {
        bool: ["true", "false", "true"],
        int: ["1024", "2048", "3072"],
        float: ["1.5", "2.5", "3.5"],
    }
    values = four.get(name) or by_type.get(Settings.model_fields[name].annotation) or ["a" * 8, "b" * 8, "c" * 8]
    if name == "db_readers":
        values = ["1", "2", "3"]
    beside = {"TELEMETRY_API_AUTH_TOKEN_FILE": str(token_file)} if name == "api_auth_enabled" else {}
    if name in ("tls_key", "tls_client_ca"):
        beside = {"TELEMETRY_TLS_CERT": "cert.pem"}
    if name in OF_POSTGRES:
        beside = {"TELEMETRY_DB_URL": "postgresql://db/telemetry"}

    def value_of(found: LoadedSettings) -> str:
        value = found.settings.model_dump()[name]
        if name in ("prune_after", "stale_after"):
            return found.shown()[variable(name)]["value"] or "none"  # as it may be given again
        shown = value.get_secret_value() if name in ("api_auth_token", "db_url") else value
        return str(shown).lower()

    default = loaded(beside)
    dotenv.write_text(f"{variable(name)}={values[0]}\n")
    from_dotenv = loaded(beside, dotenv)
    environment = {**beside, variable(name): values[1]}
    from_environment = loaded(environment, dotenv)
    from_flag = loaded(environment, dotenv, **{name: values[2]})
    given = [from_dotenv, from_environment, from_flag]
    assert [found.origins[name] for found in (default, *given)] == ["default", ".env", "environment", "flag"]
    assert [value_of(found) for found in given] == [value.lower() for value in values]
    # An empty variable counts as not set, and a flag that is not given as well.
    assert loaded({**beside, variable(name): ""}, dotenv, **{name: None}).origins[name] is Origin.DOTENV


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("30m", 1800), ("1h", 3600), ("90d", 7_776_000), ("2W", 1_209_600), ("1.5 m", 90)],
)
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    assert loaded({"TELEMETRY_STALE_AFTER": text}).settings.stale_after == seconds


@pytest.mark.parametrize("text", ["90", "0s", "-1h", "1y", "1h30m", "nan", "９s", "1e3", "101w" * 2, "99999999d"])
def test_anything_else_is_no_duration(text: str) -> None:
    assert "must be a duration" in problems({"TELEMETRY_STALE_AFTER": text})[0]


# --- Problems ------------------------------------------------------------------------------------

WRONG = {
    "TELEMETRY_DB_PATH": " ",
    "TELEMETRY_LOCK_FILE": "\t",
    "TELEMETRY_DB_JOURNAL_MODE": "OFF",
    "TELEMETRY_DB_SYNCHRONOUS": "OFF",
    "TELEMETRY_DB_BUSY_TIMEOUT_MS": "-1",
    "TELEMETRY_DB_PASSWORD_FILE": " ",
    "TELEMETRY_DB_SCHEMA": "My Schema",
    "TELEMETRY_DB_SYNC": "sometimes",
    "TELEMETRY_DB_COMMIT_TIMEOUT_S": "0",
    "TELEMETRY_DB_POLL_MS": "9",
    "TELEMETRY_DB_READERS": "0",
    "TELEMETRY_QUERY_TIMEOUT_S": "inf",
    "TELEMETRY_API_HOST": " ",
    "TELEMETRY_API_PORT": "65536",
    "TELEMETRY_API_UNIX": " ",
    "TELEMETRY_API_WORKERS": "4",
    "TELEMETRY_API_AUTH_ENABLED": "maybe",
    "TELEMETRY_API_AUTH_TOKEN_FILE": " ",
    "TELEMETRY_TOKENS_FILE": " ",
    "TELEMETRY_API_PROTECTED_MODE": "2",
    "TELEMETRY_TLS_CERT": " ",
    "TELEMETRY_TLS_KEY": " ",
    "TELEMETRY_TLS_CLIENT_CA": " ",
    "TELEMETRY_ALLOWED_HOSTS": "telemetry.example.com:8765",
    "TELEMETRY_CORS_ORIGINS": "*",
    "TELEMETRY_RATE_LIMIT_ENABLED": "x",
    "TELEMETRY_RATE_LIMIT_RPM": "0",
    "TELEMETRY_QUOTA_RUNS_PER_MINUTE": "0",
    "TELEMETRY_QUOTA_BYTES_PER_DAY": "all",
    "TELEMETRY_QUEUE_MAX": "1e3",
    "TELEMETRY_COMMIT_TARGET_MS": "0",
    "TELEMETRY_MAX_BODY_BYTES": "1023",
    "TELEMETRY_MAX_BATCH": "many",
    "TELEMETRY_MIN_FREE_MB": "-1",
    "TELEMETRY_PRUNE_AFTER": "90",
    "TELEMETRY_STALE_AFTER": "soon",
    "TELEMETRY_FULL_TEXT": "perhaps",
    "TELEMETRY_DEATH_CERTIFICATES": "perhaps",
    "TELEMETRY_WATCHED_PROCESSES": "0",
    "TELEMETRY_ALERTS_FILE": " ",
    "TELEMETRY_BACKUP_DIR": " ",
    "TELEMETRY_BACKUP_KEEP": "0",
    "TELEMETRY_SHUTDOWN_TIMEOUT_S": "0",
    "TELEMETRY_LOG_LEVEL": "LOUD",
    "TELEMETRY_LOG_FORMAT": "xml",
}


def test_every_problem_is_reported_at_once_with_the_name_of_its_variable() -> None:
    assert {variable(name) for name in Settings.model_fields} - set(WRONG) == {
        "TELEMETRY_API_AUTH_TOKEN",
        "TELEMETRY_DB_URL",  # which may hold a password, and is not shown
    }
    found = problems(WRONG)
    assert [problem.partition(":")[0] for problem in found] == list(WRONG)
    for problem, value in zip(found, WRONG.values(), strict=True):
        assert repr(value) in problem
        assert "\n" not in problem


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_each_problem_is_reported_alone_too(name: str, value: str) -> None:
    (problem,) = problems({name: value})
    assert problem.startswith(f"{name}: ")
    assert problem.endswith(f"(it is {value!r}, from the environment)")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("TELEMETRY_DB_JOURNAL_MODE", "must be DELETE, TRUNCATE, PERSIST or WAL"),
        ("TELEMETRY_API_PORT", "must be a whole number from 0 to 65535"),
        ("TELEMETRY_RATE_LIMIT_RPM", "must be a whole number, 1 or more"),
        ("TELEMETRY_API_AUTH_ENABLED", "must be true or false"),
        ("TELEMETRY_QUERY_TIMEOUT_S", "must be a number above 0 and up to 3600"),
        ("TELEMETRY_BACKUP_KEEP", "must be a whole number, 1 or more"),
    ],
)
def test_a_problem_says_what_is_allowed(name: str, rule: str) -> None:
    assert problems({name: "x"}) == [f"{name}: {rule} (it is 'x', from the environment)"]


def test_a_problem_names_the_flag_or_the_line_that_it_comes_from(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("# comment\n\nTELEMETRY_LOG_LEVEL=LOUD\n\n\n  export TELEMETRY_API_HOST=' '\n")
    with pytest.raises(ConfigurationError) as caught:
        loaded({"TELEMETRY_MAX_BATCH": "0"}, dotenv, api_port="http")
    assert [problem.rpartition("from ")[2] for problem in caught.value.problems] == [
        f"{dotenv} line 6)",
        "--port)",
        "the environment)",
        f"{dotenv} line 3)",
    ]


def test_a_line_of_dotenv_that_cannot_be_read_is_a_problem_and_is_not_shown(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"A=1\n\nsome words\nTELEMETRY_API_AUTH_TOKEN\nOTHER\nTELEMETRY_X='{TOKEN}\n")
    with pytest.raises(ConfigurationError) as caught:
        loaded({"TELEMETRY_API_PORT": "x"}, dotenv)
    *lines, port = caught.value.problems
    assert lines == [f"{dotenv} line {number}: must be NAME=value, with quotes closed" for number in (3, 4, 6)]
    assert port.startswith("TELEMETRY_API_PORT: ")
    assert TOKEN not in str(caught.value)


def test_a_dotenv_that_is_not_utf_8_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"TELEMETRY_API_HOST=m\xfcnchen\n")
    refused = telemetryd("config", status=2, cwd=tmp_path)
    assert refused.stdout == ""
    assert refused.stderr == "telemetryd: .env: is not UTF-8 text (byte 21 cannot be)\n"
    (tmp_path / ".env").write_bytes("\ufeffTELEMETRY_API_HOST=münchen\n".encode())  # as Windows' Notepad writes it
    assert loaded(dotenv=tmp_path / ".env").settings.api_host == "münchen"


def test_a_setting_that_fits_alone_but_not_with_others_is_reported_with_the_other_problems() -> None:
    both = {"TELEMETRY_API_AUTH_TOKEN": TOKEN, "TELEMETRY_API_AUTH_TOKEN_FILE": "y"}
    found = problems({"TELEMETRY_API_PORT": "x", **both, "TELEMETRY_LOG_LEVEL": "x"})
    assert sorted(problem.partition(":")[0] for problem in found) == [
        "TELEMETRY_API_AUTH_TOKEN",
        "TELEMETRY_API_PORT",
        "TELEMETRY_LOG_LEVEL",
    ]


def test_an_address_of_another_database_is_refused_and_not_shown() -> None:
    (problem,) = problems({"TELEMETRY_DB_URL": "mysql://root:secret@db/x"})
    assert problem == (
        "TELEMETRY_DB_URL: must begin with postgresql://, such as postgresql://telemetryd@db1,db2/telemetry"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me@db1:5432,db2:5433/telemetry", "postgresql://me@db1:5432,db2:5433/telemetry"),
        ("postgresql://me:secret@db1/telemetry", "postgresql://me:********@db1/telemetry"),
        ("postgresql://me:se:c@ret@db1:1/telemetry", "postgresql://me:********@db1:1/telemetry"),
        (
            "postgresql:///telemetry?host=/run&password=secret&user=me",
            "postgresql:///telemetry?host=/run&password=********&user=me",
        ),
        ("postgresql://db:1/telemetry?sslpassword=se@cret", "postgresql://db:1/telemetry?sslpassword=********"),
    ],
)
def test_the_password_in_an_address_is_masked(url: str, shown: str) -> None:
    assert loaded({"TELEMETRY_DB_URL": url}).shown()["TELEMETRY_DB_URL"]["value"] == shown


def test_what_belongs_to_postgresql_is_refused_without_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a daemon whose TELEMETRY_DB_URL is missing would begin an empty file."""
    environment = {"TELEMETRY_DB_PASSWORD_FILE": "a", "TELEMETRY_DB_SYNC": "standby"}
    assert problems(environment) == [
        "TELEMETRY_DB_PASSWORD_FILE, TELEMETRY_DB_SYNC: means nothing without TELEMETRY_DB_URL, the address of a "
        "database on PostgreSQL"
    ]
    for name, value in {**environment, "TELEMETRY_DB_URL": "postgresql://db/telemetry"}.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "telemetry.sqlite"
    assert load_for({"db_path": file}).settings.db_url is None  # a command that is told which file


def test_what_belongs_to_a_sqlite_file_is_refused_with_an_address_of_postgresql() -> None:
    url = {"TELEMETRY_DB_URL": "postgresql://db/telemetry"}
    assert loaded(url).settings.own_socket is None
    assert problems({**url, "TELEMETRY_DB_PATH": "a", "TELEMETRY_MIN_FREE_MB": "0"}) == [
        "TELEMETRY_DB_PATH, TELEMETRY_MIN_FREE_MB: means nothing with TELEMETRY_DB_URL, which chooses PostgreSQL; "
        "leave it out"
    ]


@pytest.mark.parametrize("workers", ["0", "2", "-1", "1000"])
def test_there_is_one_worker(workers: str) -> None:
    (problem,) = problems({"TELEMETRY_API_WORKERS": workers})
    assert problem == (
        f"TELEMETRY_API_WORKERS: must be 1, not {workers}: one writer is the whole point, more would corrupt the "
        f"database (it is {workers!r}, from the environment)"
    )


# --- The token -----------------------------------------------------------------------------------


def test_a_token_has_to_be_one_that_protects(tmp_path: Path) -> None:
    enabled = {"TELEMETRY_API_AUTH_ENABLED": "true"}
    file = tmp_path / "token"
    (problem,) = problems({**enabled, "TELEMETRY_API_AUTH_TOKEN": "short"})
    assert problem.startswith("TELEMETRY_API_AUTH_TOKEN: must have at least 8 characters")
    assert "short" not in problem
    (problem,) = problems({**enabled, "TELEMETRY_API_AUTH_TOKEN_FILE": str(file)})
    assert problem.startswith("TELEMETRY_API_AUTH_TOKEN_FILE: cannot be read: ")
    file.write_text("\n short \n")
    (problem,) = problems({**enabled, "TELEMETRY_API_AUTH_TOKEN_FILE": str(file)})
    assert problem.startswith(f"TELEMETRY_API_AUTH_TOKEN_FILE: {file}: must have at least 8 characters")
    file.write_bytes(b"\xff" * 20)
    (problem,) = problems({**enabled, "TELEMETRY_API_AUTH_TOKEN_FILE": str(file)})
    assert problem.startswith("TELEMETRY_API_AUTH_TOKEN_FILE: cannot be read: ")
    file.write_text(f" {TOKEN}\n")
    assert loaded({**enabled, "TELEMETRY_API_AUTH_TOKEN_FILE": str(file)}).settings.token() == TOKEN.encode()
    assert loaded({**enabled, "TELEMETRY_API_AUTH_TOKEN": f"{TOKEN}\n"}).settings.token() == TOKEN.encode()
    both = {"TELEMETRY_API_AUTH_TOKEN": TOKEN, "TELEMETRY_API_AUTH_TOKEN_FILE": str(file)}
    (problem,) = problems(both)
    assert problem.startswith("TELEMETRY_API_AUTH_TOKEN: set either the token or TELEMETRY_API_AUTH_TOKEN_FILE")


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    environment = {"TELEMETRY_API_AUTH_TOKEN": TOKEN, "TELEMETRY_API_AUTH_ENABLED": "true"}
    found = loaded(environment)
    assert found.shown()["TELEMETRY_API_AUTH_TOKEN"] == {"value": "********", "origin": "environment"}
    assert TOKEN not in f"{found!r} {found} {found.settings!r} {found.settings} {found.settings.model_dump_json()}"
    assert TOKEN not in str(problems({**environment, "TELEMETRY_API_PORT": "x", "TELEMETRY_API_AUTH_TOKEN_FILE": "y"}))
    for arguments in (["config"], ["config", "--json"]):
        printed = CliRunner().invoke(main, arguments, env={**environment, "TELEMETRY_DB_PATH": str(tmp_path / "db")})
        assert printed.exit_code == 0
        assert TOKEN not in printed.output
        assert "********" in printed.output


def test_a_token_cannot_be_given_on_the_command_line() -> None:
    for command in ("serve", "config"):
        refused = CliRunner().invoke(main, [command, "--auth-token", TOKEN])
        assert refused.exit_code == 2
        assert "--auth-token " not in CliRunner().invoke(main, [command, "--help"]).output


# --- Remarks -------------------------------------------------------------------------------------


def test_an_unknown_variable_of_the_family_is_remarked_on(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TELEMETRY_DB_PAHT=/x\nOTHER=1\n")
    environment = {
        "TELEMETRY_API_PROT": "1",
        "TELEMETRY_BUFFER_DIR": "/x",
        "TELEMETRY_API_URL": "http://x",
        "PATH": "/bin",
    }
    assert loaded(environment, tmp_path / ".env").remarks == (
        "TELEMETRY_API_PROT is not a setting of telemetryd and has no effect",
        "TELEMETRY_DB_PAHT is not a setting of telemetryd and has no effect",
    )


LEGACY = {
    "service": "TELEMETRY_DB_PATH TELEMETRY_LOCK_FILE TELEMETRY_DB_JOURNAL_MODE TELEMETRY_DB_SYNCHRONOUS "
    "TELEMETRY_DB_BUSY_TIMEOUT_MS TELEMETRY_API_HOST TELEMETRY_API_PORT TELEMETRY_API_WORKERS "
    "TELEMETRY_API_AUTH_ENABLED TELEMETRY_API_AUTH_TOKEN TELEMETRY_RATE_LIMIT_ENABLED TELEMETRY_RATE_LIMIT_RPM "
    "TELEMETRY_LOG_LEVEL",
    "client": "TELEMETRY_BUFFER_DIR TELEMETRY_API_URL METRICS_API_URL",
    "compat": "AGENT_OWNER",
    "remark": "TELEMETRY_DB_CONNECT_TIMEOUT_SECONDS TELEMETRY_DB_MAX_RETRIES TELEMETRY_DB_RETRY_BASE_DELAY_SECONDS "
    "TELEMETRY_RETENTION_DAYS TELEMETRY_DRY_RUN_CLEANUP TELEMETRY_LEVEL TELEMETRY_SAMPLING_RATE "
    "TELEMETRY_MAX_PAYLOAD_BYTES DATABASE_URL TELEMETRY_BUFFER_MAX_SIZE_MB TELEMETRY_BUFFER_MAX_AGE_HOURS "
    "TELEMETRY_SYNC_INTERVAL_SECONDS TELEMETRY_SYNC_BATCH_SIZE METRICS_API_TOKEN METRICS_API_AUTH_REQUIRED "
    "METRICS_API_ENABLED GOOGLE_SHEETS_API_ENABLED GOOGLE_SHEETS_API_URL TELEMETRY_BASE_DIR AGENT_METRICS_DIR "
    "TELEMETRY_NDJSON_DIR TELEMETRY_SKIP_VALIDATION TELEMETRY_TEST_MODE TELEMETRY_RETRY_BACKOFF_FACTOR",
}
"""The variables of 3.x (LOG_LEVEL has tests of its own), by who heeds them; the last ones have no effect."""


def test_every_variable_of_the_replaced_service_has_its_effect_or_a_remark(tmp_path: Path) -> None:
    known = {variable(name) for name in Settings.model_fields}
    heeded = {kind: set(names.split()) for kind, names in LEGACY.items()}
    assert heeded["service"] <= known
    assert heeded["client"] <= VARIABLES.keys()
    assert heeded["remark"] == WITHOUT_EFFECT.keys()
    in_dotenv, in_environment = (sorted(heeded["remark"])[place::2] for place in (0, 1))
    (tmp_path / ".env").write_text("".join(f"{name}=secret\n" for name in in_dotenv))
    given = {**dict.fromkeys(in_environment, "secret"), "METRICS_API_URL": "http://x", "AGENT_OWNER": "me"}
    shown = loaded(given, tmp_path / ".env").remarks
    assert [remark.partition(" has no effect")[0] for remark in shown] == sorted(heeded["remark"])
    assert "secret" not in str(shown)
    assert "TELEMETRY_PRUNE_AFTER" in next(text for text in shown if text.startswith("TELEMETRY_RETENTION_DAYS"))
    printed = telemetryd("config", status=0, timeout_s=60, cwd=tmp_path, **given).stderr
    assert printed.splitlines() == [f"telemetryd: remark: {remark}" for remark in shown]
    assert not loaded(dict.fromkeys(heeded["remark"], "")).remarks  # empty counts as not set


def test_the_log_level_of_the_replaced_service_counts_where_ours_is_not_set(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("LOG_LEVEL=debug\n")
    found = loaded({}, dotenv)
    assert (found.settings.log_level, found.origins["log_level"]) == ("DEBUG", Origin.DOTENV)
    found = loaded({"LOG_LEVEL": "warn"}, dotenv)
    assert (found.settings.log_level, found.origins["log_level"]) == ("WARNING", Origin.ENVIRONMENT)
    dotenv.write_text("TELEMETRY_LOG_LEVEL=critical\n")
    assert loaded({"LOG_LEVEL": "debug"}, dotenv).settings.log_level == "ERROR"
    found = loaded({"LOG_LEVEL": "verbose"})
    assert (found.settings.log_level, found.origins["log_level"]) == ("INFO", Origin.DEFAULT)
    assert found.remarks == ("LOG_LEVEL='verbose' is no level of telemetryd and has no effect",)
    assert loaded({"LOG_LEVEL": "verbose"}, log_level="info").remarks == ()


def test_a_token_that_is_not_asked_for_is_remarked_on(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    on = {"TELEMETRY_API_AUTH_ENABLED": "true"}
    for given in ({"TELEMETRY_API_AUTH_TOKEN": TOKEN}, {"TELEMETRY_API_AUTH_TOKEN_FILE": str(tmp_path / "token")}):
        assert loaded(given).remarks == (
            "A token is set but not asked for, because TELEMETRY_API_AUTH_ENABLED is false",
        )
        assert loaded(given | on).remarks == ()
    shown = telemetryd("config", "--json", cwd=tmp_path, TELEMETRY_API_AUTH_TOKEN=TOKEN)
    assert shown.stderr == f"telemetryd: remark: {loaded({'TELEMETRY_API_AUTH_TOKEN': TOKEN}).remarks[0]}\n"
    assert json.loads(shown.stdout)["TELEMETRY_API_AUTH_TOKEN"]["value"] == "********"


# --- The process ---------------------------------------------------------------------------------


def test_config_prints_every_setting_with_its_origin(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TELEMETRY_QUEUE_MAX=7\n")
    arguments = ("config", "--port", "9000", "--no-protected-mode")
    variables: dict[str, Any] = {"TELEMETRY_API_HOST": "127.0.0.1", "TELEMETRY_LOG_LEVEL": "debug"}
    printed = telemetryd(*arguments, "--json", cwd=tmp_path, **variables)
    shown = json.loads(printed.stdout)
    assert list(shown) == [variable(name) for name in Settings.model_fields]
    assert shown["TELEMETRY_API_PORT"] == {"value": 9000, "origin": "flag"}
    assert shown["TELEMETRY_API_PROTECTED_MODE"] == {"value": False, "origin": "flag"}
    assert shown["TELEMETRY_API_HOST"] == {"value": "127.0.0.1", "origin": "environment"}
    assert shown["TELEMETRY_LOG_LEVEL"] == {"value": "DEBUG", "origin": "environment"}
    assert shown["TELEMETRY_QUEUE_MAX"] == {"value": 7, "origin": ".env"}
    assert shown["TELEMETRY_MAX_BATCH"] == {"value": 10000, "origin": "default"}
    lines = telemetryd(*arguments, cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(shown)
    assert next(line for line in lines if line.startswith("TELEMETRY_QUEUE_MAX ")).endswith("= 7  # .env")
    printed_of = {line.split()[0]: line.partition(" = ")[2] for line in lines}
    assert printed_of["TELEMETRY_API_PROTECTED_MODE"] == "false  # flag"
    assert printed_of["TELEMETRY_DB_PATH"] == f"{tmp_path / 'data' / 'telemetry.sqlite'}  # default"
    assert not (tmp_path / "data").exists()


def test_wrong_settings_end_the_process_before_the_database_is_touched(tmp_path: Path) -> None:
    database = tmp_path / "data" / "telemetry.sqlite"
    refused = telemetryd(
        "serve", "--max-batch", "0", status=2, cwd=tmp_path,
        TELEMETRY_DB_PATH=str(database), TELEMETRY_API_WORKERS="2", TELEMETRY_API_PORT="http", TELEMETRY_LOG_LEVEL="x",
    )  # fmt: skip
    assert refused.stdout == ""
    lines = refused.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "TELEMETRY_API_PORT", "TELEMETRY_API_WORKERS", "TELEMETRY_MAX_BATCH", "TELEMETRY_LOG_LEVEL",
    ]  # fmt: skip
    assert all(line.startswith("telemetryd: TELEMETRY_") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_leave_an_existing_database_alone(tmp_path: Path) -> None:
    database = tmp_path / "telemetry.sqlite"
    database.write_bytes(b"whatever it is")
    before = database.stat()
    telemetryd("serve", status=2, cwd=tmp_path, TELEMETRY_DB_PATH=str(database), TELEMETRY_API_WORKERS="0")
    assert [path.name for path in tmp_path.iterdir()] == ["telemetry.sqlite"]
    assert (database.stat().st_mtime_ns, database.stat().st_atime_ns) == (before.st_mtime_ns, before.st_atime_ns)
    assert database.read_bytes() == b"whatever it is"


def test_an_unknown_flag_ends_the_process_with_status_2(tmp_path: Path) -> None:
    telemetryd("serve", "--nope", status=2, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
