"""Which hosts decode recordings without a sandbox."""

from alembic import op

revision = "0004"
down_revision = "0003"

CHANGES = """
ALTER TABLE hosts ADD COLUMN unsandboxed boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN hosts.unsandboxed IS 'ffmpeg runs there without a sandbox, as ALLOW_UNSANDBOXED lets it';
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(CHANGES)
