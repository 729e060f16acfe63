"""The OpenAPI description of each endpoint: parameters, responses, errors."""

from __future__ import annotations

from typing import Final

from telemetryd.model import alerts, answers, changes, event_queries, events, queries, regressions, runs, stats
from telemetryd.model.requests import ProcessRequest, RedactRequest
from telemetryd.model.tokens import Scope
from telemetryd.web.body import JSON_TYPES, NDJSON_TYPES
from telemetryd.web.components import ref
from telemetryd.web.openapi import ACCURACY, LAST_EVENT_ID, LINK, SNAPSHOT, TOTAL, Operation

_WRITE_ERRORS: Final = (400, 413, 415, 422, 503)


def _page_of(what: str, kind: object) -> Operation:
    return Operation(
        f"Get the web page of a run's {what}",
        "Known are github.com, gitlab.com and bitbucket.org; otherwise null.",
        scope=Scope.READ,
        answers={200: ("The page.", kind)},
        errors=(404, 503),
    )


def _slice_of(summary: str, model: str, kind: object) -> Operation:
    return Operation(
        summary,
        "Needs authentication, or the Unix socket. Ask again while `more` is true.",
        scope=Scope.ADMIN,
        tags=("admin",),
        body=ref(model),
        answers={200: ("What was done, or with dry_run what would be.", kind)},
        errors=_WRITE_ERRORS,
    )


CREATE_RUN: Final = Operation(
    "Create a run",
    "A known event_id is a duplicate: the stored run stays as it is.",
    scope=Scope.INGEST,
    body=ref("NewRun"),
    example=runs.example(runs.NewRun, runs.BEGUN),
    answers={
        201: ("The run is stored and durable.", answers.RunCreated),
        200: ("The event_id is already stored.", answers.RunDuplicate),
    },
    errors=_WRITE_ERRORS,
)

CREATE_BATCH: Final = Operation(
    "Create many runs",
    "An array, an object with the array under `runs`, or one run a line (NDJSON). Invalid items are reported one by "
    "one; all others are stored in one transaction.",
    scope=Scope.INGEST,
    body=ref("NewRuns"),
    body_types=(*JSON_TYPES, NDJSON_TYPES[0]),
    example=[runs.example(runs.NewRun, runs.BEGUN, number) for number in (0, 1)],
    parameters=queries.CREATE,
    answers={200: ("What became of the items.", answers.BatchStored)},
    errors=_WRITE_ERRORS,
)

LIST_RUNS: Final = Operation(
    "Query runs",
    "Newest first. If more follow, the Link header holds the next page (rel=next). With `fields`, each run has only "
    "those.",
    scope=Scope.READ,
    parameters=queries.LIST,
    answers={200: ("The runs.", answers.RunList)},
    headers={**LINK, **TOTAL, **ACCURACY},
    errors=(400, 503),
)

STREAM_RUNS: Final = Operation(
    "Follow the runs",
    "Server-sent events: `run` with each run that is created or changed, after its commit, as one answers it; "
    "`missed` with the number of changes that were left out because the client was too slow. A client that comes "
    "back with the last id goes on there, also after a restart of the daemon.",
    scope=Scope.READ,
    parameters=changes.STREAM,
    other_parameters=(LAST_EVENT_ID,),
    answers={200: ("Events without an end.", str)},
    answer_type="text/event-stream",
    errors=(400, 503),
)

LIST_CHANGES: Final = Operation(
    "List the changes after a number of the commit sequence",
    "In the order of the commits; of each run only its newest change, with the run as it is now. Go on with "
    "`last` as `after`, while `more` is true at once. Events come with the page that has the last change, each "
    "with the id of its run; go on with the id of the last one as `events_after`.",
    scope=Scope.READ,
    parameters=changes.LIST,
    answers={200: ("The changes.", changes.ChangesAnswer)},
    errors=(400, 410, 503),
)

EXPORT_RUNS: Final = Operation(
    "Export runs",
    "All that match, in the order of their arrival, as NDJSON, CSV (RFC 4180) or Parquet. The "
    f"header {queries.SNAPSHOT} says `exact` if they are one snapshot, X-Total-Count how many they are. An "
    "export that could not be brought to its end is cut off in the middle of the chunked encoding.",
    scope=Scope.READ,
    parameters=queries.EXPORT,
    answers={200: ("The runs.", str)},
    answer_type=queries.MEDIA_TYPES[queries.Format.NDJSON],
    other_answer_types=tuple(queries.MEDIA_TYPES.values())[1:],
    headers={**TOTAL, **SNAPSHOT},
    errors=(400, 503),
)

GET_RUN: Final = Operation(
    "Get a run",
    scope=Scope.READ,
    parameters=queries.GET,
    answers={200: ("The run.", answers.StoredRun)},
    errors=(400, 404, 503),
)

UPDATE_RUN: Final = Operation(
    "Update a run",
    "A field that is null or missing stays as it is.",
    scope=Scope.INGEST,
    body=ref("RunPatch"),
    example=runs.example(runs.RunPatch, runs.ENDED, 1),
    answers={200: ("The run is changed and the change durable.", answers.RunUpdated)},
    errors=(404, *_WRITE_ERRORS),
)

ASSOCIATE_COMMIT: Final = Operation(
    "Record the commit that a run led to",
    scope=Scope.INGEST,
    body=ref("CommitAssociation"),
    example=runs.example(runs.CommitAssociation),
    answers={200: ("The commit is recorded and durable.", answers.CommitAssociated)},
    errors=(404, *_WRITE_ERRORS),
)

CREATE_EVENTS: Final = Operation(
    "Report events of a run",
    f"One event, or an array of at most {events.MAX_EVENTS}; with one bad event none is stored. A key that the "
    "run already has is a duplicate: the stored event stays as it is.",
    scope=Scope.INGEST,
    body=ref("NewEvents"),
    example=runs.example(events.NewEvent),
    answers={201: ("The events are stored and durable; those with a known key were so before.", answers.EventsStored)},
    errors=(404, *_WRITE_ERRORS),
)

LIST_EVENTS: Final = Operation(
    "List a run's events",
    "Oldest first, or the last ones first with sort=-timestamp. If more follow, the Link header holds the next "
    "page (rel=next).",
    scope=Scope.READ,
    parameters=event_queries.LIST_EVENTS,
    answers={200: ("The events.", answers.EventList)},
    headers=LINK,
    errors=(400, 404, 503),
)

REGISTER_PROCESS: Final = Operation(
    "Register the process that works on a run",
    "If it ends while the run is still running, the run becomes a failure within a second. Only a process on "
    "the daemon's own machine can be watched.",
    scope=Scope.INGEST,
    body=ref("ProcessRequest"),
    example=runs.example(ProcessRequest),
    answers={201: ("The process is watched, also after a restart of the daemon.", answers.ProcessWatched)},
    errors=(404, 409, *_WRITE_ERRORS),
)

GET_COMMIT_URL: Final = _page_of("commit", answers.CommitPage)

GET_REPO_URL: Final = _page_of("repository", answers.RepoPage)

GET_STATS: Final = Operation(
    "Statistics of runs",
    "Counts, sums and quantiles by the time of created_at, from figures that the writer keeps: they are right "
    "as soon as a change is acknowledged. Only groups with runs are answered.",
    scope=Scope.READ,
    parameters=stats.PARAMETERS,
    answers={200: ("The groups, the earliest bucket first, then by names.", stats.Stats)},
    errors=(400, 503),
)

GET_REGRESSIONS: Final = Operation(
    "Commits that broke something",
    "For each agent and job type: the commit since which runs fail more often or take longer, if neither chance nor "
    "an outage of up to three days explains it. Days are compared, not runs; hours in which other agents fail as well "
    "are left out. What changes outside at the moment of a deployment, and stays, cannot be told from a commit.",
    scope=Scope.READ,
    parameters=regressions.PARAMETERS,
    answers={200: ("What was found, the most certain first.", regressions.RegressionReport)},
    errors=(400, 503),
)

LIST_ALERTS: Final = Operation(
    "List the rules of alerts and their state",
    "The rules of TELEMETRY_ALERTS_FILE, in its order, and for which agents (and job types) each is firing.",
    scope=Scope.READ,
    answers={200: ("The rules.", alerts.Alerts)},
    errors=(400, 503),
)

GET_METADATA: Final = Operation(
    "List agents and job types",
    scope=Scope.READ,
    answers={200: ("The names in use.", answers.Metadata)},
    errors=(503,),
)

GET_HEALTH: Final = Operation(
    "Check health",
    "Answers at once, with 503 when writes are not taken.",
    scope=None,
    tags=("operation",),
    answers={200: ("Writes are taken.", answers.Health), 503: ("Writes are not taken.", answers.Health)},
)

GET_METRICS: Final = Operation(
    "Read totals and metrics",
    "JSON, or Prometheus text if Accept or `format` asks for it.",
    scope=Scope.READ,
    tags=("operation",),
    parameters=queries.METRICS,
    answers={200: ("The totals.", answers.Totals)},
    other_answer_types=("text/plain", "application/openmetrics-text"),
    errors=(400, 503),
)

PRUNE_RUNS: Final = _slice_of("Delete old runs", "PruneRequest", answers.RunsPruned)

REAP_RUNS: Final = _slice_of("Cancel stale runs", "ReapRequest", answers.RunsReaped)

DELETE_RUN: Final = Operation(
    "Delete a run",
    "Needs authentication, or the Unix socket. The run goes with its events and whatever belongs to it, and with it "
    "what it added to totals and statistics; followers and clients of the changes learn of it. Who sends the same "
    "event_id again creates it again.",
    scope=Scope.ADMIN,
    tags=("admin",),
    answers={200: ("The run is gone.", answers.DeletedRun)},
    errors=(400, 404, 503),
)

REDACT_RUN: Final = Operation(
    "Remove what fields of a run hold",
    "Needs authentication, or the Unix socket. For a secret that should not have been sent: the fields become null, "
    "and with `events` the payloads of all events. The run stays, so who sends the same event_id again finds it known.",
    scope=Scope.ADMIN,
    tags=("admin",),
    body=ref("RedactRequest"),
    example=runs.example(RedactRequest),
    answers={200: ("It is removed.", answers.RunRedacted)},
    errors=(404, *_WRITE_ERRORS),
)

CONFIRM: Final = Operation(
    "Confirm what may be done without a command",
    "Needs authentication, or the Unix socket. Runs of an age may be deleted by themselves (a shorter age has "
    "to be confirmed again), or the clock is right although it has jumped.",
    scope=Scope.ADMIN,
    tags=("admin",),
    body=ref("ConfirmRequest"),
    answers={200: ("It is written down for this database.", answers.Confirmed)},
    errors=_WRITE_ERRORS,
)

MAKE_BACKUP: Final = Operation(
    "Make a verified backup",
    "Needs authentication, or the Unix socket; the directory is the setting TELEMETRY_BACKUP_DIR. It is packed with "
    "Zstandard unless compress is false.",
    scope=Scope.ADMIN,
    tags=("admin",),
    body=ref("BackupRequest"),
    answers={200: ("The backup is verified and in its place.", answers.BackupMade)},
    errors=_WRITE_ERRORS,
)
