"""Which hosts decode recordings without a sandbox."""

from alembic import op

revision = "0004"
down_revision = "0003"

CHANGES = """
ALTER TABLE hosts ADD COLUMN unsandboxed text[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN hosts.unsandboxed IS 'kinds of workers that run ffmpeg without a sandbox (ALLOW_UNSANDBOXED)';
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(CHANGES)
