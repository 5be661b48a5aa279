"""What health asks of hosts and timers: which release and models run where, and when a job was last done."""

from alembic import op

revision = "0005"
down_revision = "0004"

CHANGES = """
ALTER TABLE hosts ADD COLUMN releases jsonb NOT NULL DEFAULT '{}', ADD COLUMN models jsonb NOT NULL DEFAULT '{}';
COMMENT ON COLUMN hosts.releases IS 'release of each kind of worker, as it started';
COMMENT ON COLUMN hosts.models IS 'revision of each model, as its GPU worker loaded it';

CREATE TABLE runs (job text PRIMARY KEY, ended_at timestamptz NOT NULL);
COMMENT ON TABLE runs IS 'when each timer''s job was last done: reconcile, audit, retention, dump';
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(CHANGES)
