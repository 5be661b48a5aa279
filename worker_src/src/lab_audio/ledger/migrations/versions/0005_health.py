"""What health asks: which release and models run where, which host is lost, when a timer's job was last done."""

from alembic import op

revision = "0005"
down_revision = "0004"

CHANGES = """
ALTER TABLE hosts ADD COLUMN releases jsonb NOT NULL DEFAULT '{}', ADD COLUMN models jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN silent_since timestamptz;
COMMENT ON COLUMN hosts.releases IS 'release of each kind of worker, as it started';
COMMENT ON COLUMN hosts.models IS 'revision of each model, as its GPU worker loaded it';
COMMENT ON COLUMN hosts.silent_since IS 'when a lost host was last seen, until it is forgotten';
CREATE INDEX batches_flagged ON batches (batch_id) WHERE flags <> '{}' AND dropped_at IS NULL;

CREATE TABLE runs (job text PRIMARY KEY, ended_at timestamptz NOT NULL);
COMMENT ON TABLE runs IS 'when each was last done: reconcile, audit, retention, metrics, dump, a look at the source';
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(CHANGES)
