"""SQL for confirmations: what the operator confirmed, and when the clock was right."""

from __future__ import annotations

from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.answers import answers
from telemetryd.engine.postgres.statements.predicates import one
from telemetryd.model.clocks import Reading
from telemetryd.model.queries import Confirmed, GetConfirmed

_NEWEST: Final = """
    SELECT greatest(
        (SELECT updated_at FROM agent_runs WHERE id = (SELECT max(id) FROM agent_runs)),
        (SELECT updated_at FROM agent_runs WHERE id = (SELECT run FROM run_changes ORDER BY seq DESC LIMIT 1)),
        (SELECT max(applied_at) FROM schema_migrations)
    )
"""


@answers(GetConfirmed)
def fetch_confirmed(plain: Plain, query: GetConfirmed) -> Confirmed:
    """Fetch what is confirmed, and what is known of the clock."""
    age = plain.execute("SELECT after_s FROM confirmed_prune").fetchone()
    clock = plain.execute("SELECT moment, boot_id, up_s FROM trusted_clock").fetchone()
    newest = one(plain, _NEWEST)[0]
    return Confirmed(None if age is None else age[0], None if clock is None else Reading(*clock), newest)
