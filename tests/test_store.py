from __future__ import annotations

from tests.conftest import Api, make_run


async def test_a_run_that_was_acknowledged_is_there_at_once(api: Api) -> None:
    run = make_run(metrics_json={"tokens": 5})
    assert await api.post(run) == {"status": "created", "event_id": run["event_id"], "run_id": run["run_id"]}
    stored = await api.get(f"/api/v1/runs/{run['event_id']}")
    assert stored["metrics_json"] == {"tokens": 5}
    assert await api.post(run, 200) == {
        "status": "duplicate",
        "event_id": run["event_id"],
        "message": "Event already exists (idempotent)",
    }
