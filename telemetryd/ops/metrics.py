"""The daemon's own metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    Metric,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import telemetryd
from telemetryd.errors import UnavailableError

_LATENCY: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Metrics:
    """The counters of one daemon, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        Info("telemetryd_build", "Version of telemetryd.", registry=self.registry).info(
            {"version": telemetryd.__version__}
        )
        self.requests = Counter(
            "telemetryd_http_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "telemetryd_http_request_duration_seconds",
            "Time from the request's head to its answer.",
            ("method", "route"),
            buckets=_LATENCY,
            registry=self.registry,
        )
        self._requests: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        runs = Counter(
            "telemetryd_runs_received",
            "Runs received, by what became of them.",
            ("outcome",),
            registry=self.registry,
        )
        self._runs = {outcome: runs.labels(outcome) for outcome in ("created", "duplicate", "invalid")}
        self.differing = Counter(
            "telemetryd_runs_differing",
            "Known runs that arrived again with another body.",
            registry=self.registry,
        )
        events = Counter(
            "telemetryd_events_received",
            "Run events received, by what became of them.",
            ("outcome",),
            registry=self.registry,
        )
        self._events = {outcome: events.labels(outcome) for outcome in ("created", "duplicate")}
        self._handshakes = Counter(
            "telemetryd_tls_handshakes_failed",
            "TLS handshakes that failed, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self._certificate_expires = Gauge(
            "telemetryd_tls_certificate_expires_timestamp_seconds",
            "When the TLS certificate expires; 0 without TLS.",
            registry=self.registry,
        )
        self.refused = Counter(
            "telemetryd_writes_refused",
            "Writes answered 503, by reason.",
            ("reason",),
            registry=self.registry,
        )
        for reason in (problem.reason for problem in UnavailableError.__subclasses__()):
            self.refused.labels(reason)  # from 0 on: alerts are of an increase, also by the first
        self.group_commands = Histogram(
            "telemetryd_group_commands",
            "Commands in one group commit.",
            buckets=_SIZES,
            registry=self.registry,
        )
        self.commit_seconds = Histogram(
            "telemetryd_commit_duration_seconds",
            "Time of one group commit, from its hand-over to the writing thread until the event loop knows it durable.",
            buckets=_LATENCY,
            registry=self.registry,
        )
        self.last_commit = Gauge(
            "telemetryd_last_commit_timestamp_seconds",
            "When the last group was committed.",
            registry=self.registry,
        )
        self.certificates = Counter(
            "telemetryd_death_certificates",
            "Runs failed because their process had ended.",
            registry=self.registry,
        )
        self._processes = Gauge(
            "telemetryd_processes_watched", "Processes watched for death certificates.", registry=self.registry
        )
        self._subscribers = Gauge("telemetryd_tails_open", "Streams of runs that are open.", registry=self.registry)
        self.changes_missed = Counter(
            "telemetryd_tails_missed",
            "Changes that were left out of streams because their clients were too slow.",
            registry=self.registry,
        )
        self.deliveries_given_up = Counter(
            "telemetryd_alert_deliveries_given_up",
            "Messages to webhooks that were given up: a day old, or too many waited.",
            registry=self.registry,
        )
        self._alerts_firing = Gauge(
            "telemetryd_alerts_firing",
            "For how many subjects a rule of alerts is firing.",
            ("rule",),
            registry=self.registry,
        )
        self._deliveries_waiting = Gauge(
            "telemetryd_alert_deliveries_waiting",
            "Messages of alerts that a webhook has not confirmed yet.",
            ("webhook",),
            registry=self.registry,
        )
        self._token_requests = Counter(
            "telemetryd_token_requests",
            "Requests with a token that is accepted, by the class of their answer: 2xx.",
            ("token", "status"),
            registry=self.registry,
        )
        self._token_refusals = Counter(
            "telemetryd_token_refusals",
            "What was refused, by the token's name (none if it is missing or wrong) and reason; items of batches too.",
            ("token", "reason"),
            registry=self.registry,
        )
        self._of_tokens: dict[tuple[Counter, str, str], Counter] = {}
        self._token_names: Set[str] = {""}
        self._tokens = Gauge("telemetryd_tokens", "Tokens that are known.", registry=self.registry)
        self.tokens_broken = Gauge(
            "telemetryd_tokens_broken",
            "1 while the file of tokens cannot be used, so that those known before stay.",
            registry=self.registry,
        )
        self._quota_refusals = Counter(
            "telemetryd_quota_refusals",
            "Requests and items of batches answered 429 for a quota, by whose it is (token or agent) and which.",
            ("whose", "quota"),
            registry=self.registry,
        )
        self._oldest_waiting = Gauge(
            "telemetryd_oldest_waiting_seconds",
            "For how long the oldest command waits to be durable; 0 if none does.",
            registry=self.registry,
        )
        self._wal_bytes = Gauge(
            "telemetryd_wal_bytes", "Size of the write-ahead log, a second ago at most.", registry=self.registry
        )
        self._disk_free = Gauge(
            "telemetryd_disk_free_bytes", "Room left on the database's disk, a second ago.", registry=self.registry
        )
        self._queue_depth = Gauge("telemetryd_queue_depth", "Commands waiting for the writer.", registry=self.registry)
        self._runs_stored = Gauge("telemetryd_runs_stored", "Runs in the database.", registry=self.registry)

    def watch_certificate(self, expires: Callable[[], float]) -> None:
        """Take the time when the TLS certificate expires from a function whenever it is asked for."""
        self._certificate_expires.set_function(expires)

    def watch_queue(self, depth: Callable[[], int], oldest_s: Callable[[], float]) -> None:
        """Take the queue's depth and its oldest command's age from functions whenever they are asked for."""
        self._queue_depth.set_function(depth)
        self._oldest_waiting.set_function(oldest_s)

    def show_disk(self, free_bytes: int, wal_bytes: int) -> None:
        """Show what was seen of the disk."""
        self._disk_free.set(free_bytes)
        self._wal_bytes.set(wal_bytes)

    def show_alerts(self, firing: Mapping[str, int], waiting: Mapping[str, int]) -> None:
        """Show for how many subjects each rule is firing, and how many messages wait for each webhook."""
        for rule, subjects in firing.items():
            self._alerts_firing.labels(rule).set(subjects)
        for webhook, messages in waiting.items():
            self._deliveries_waiting.labels(webhook).set(messages)

    def watch_processes(self, count: Callable[[], int]) -> None:
        """Take the number of watched processes from a function whenever it is asked for."""
        self._processes.set_function(count)

    def watch_subscribers(self, count: Callable[[], int]) -> None:
        """Take the number of open streams from a function whenever it is asked for."""
        self._subscribers.set_function(count)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request; methods that no route knows are counted together."""
        key = (method if method in _METHODS else "other", route, status)
        children = self._requests.get(key)
        if children is None:
            method, route, status = key
            children = (self.requests.labels(method, route, status), self.request_seconds.labels(method, route))
            self._requests[key] = children
        answered, duration = children
        answered.inc()
        duration.observe(seconds)

    def count_handshake(self, reason: str) -> None:
        """Count a TLS handshake that has failed."""
        self._handshakes.labels(reason).inc()

    def count_token(self, name: str, status: int) -> None:
        """Count a request with a token."""
        self._count_of_token(self._token_requests, name, f"{status // 100}xx")

    def refuse_token(self, name: str, reason: str) -> None:
        """Count what was refused to a token; its name is empty if it is missing or wrong."""
        self._count_of_token(self._token_refusals, name, reason)

    def refuse_quota(self, whose: str, quota: str) -> None:
        """Count what was refused for a quota."""
        self._quota_refusals.labels(whose, quota).inc()

    def know_tokens(self, names: Set[str]) -> None:
        """Show what these tokens do, and nothing of others, which are revoked: not even what they do last."""
        self._token_names = {"", *names}
        self._tokens.set(len(names))
        for counter, token, label in [key for key in self._of_tokens if key[1] not in self._token_names]:
            counter.remove(token, label)
            del self._of_tokens[counter, token, label]

    def _count_of_token(self, counter: Counter, name: str, label: str) -> None:
        child = self._of_tokens.get((counter, name, label))
        if child is None:
            if name not in self._token_names:
                return
            child = self._of_tokens[counter, name, label] = counter.labels(name, label)
        child.inc()

    def count_runs(self, *, created: int = 0, duplicate: int = 0, invalid: int = 0) -> None:
        """Count runs received, by what became of them."""
        for outcome, runs in (("created", created), ("duplicate", duplicate), ("invalid", invalid)):
            if runs:
                self._runs[outcome].inc(runs)

    def count_events(self, *, created: int, duplicate: int) -> None:
        """Count run events received, by what became of them."""
        for outcome, events in (("created", created), ("duplicate", duplicate)):
            if events:
                self._events[outcome].inc(events)

    def expose(self, accept: str, runs_stored: int) -> tuple[bytes, str]:
        """Return the metrics as text and its media type: OpenMetrics if the client prefers it."""
        self._runs_stored.set(runs_stored)
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version or a quotation that the library cannot read
            encode, content_type = choose_encoder("")
        registry = self.registry if "openmetrics" in content_type else _Plain(self.registry)
        return encode(registry), content_type


class _Plain(Collector):
    """A registry without the series `…_created`, to which only OpenMetrics gives a meaning."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        for metric in self._registry.collect():
            if any(sample.name.endswith(_CREATED) for sample in metric.samples):
                metric.samples = [sample for sample in metric.samples if not sample.name.endswith(_CREATED)]
            yield metric


_CREATED: Final = "_created"
