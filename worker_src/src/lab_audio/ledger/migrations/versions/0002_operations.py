"""What host loss, admission control, retention and dead letters need to know."""

from alembic import op

revision = "0002"
down_revision = "0001"

CHANGES = """
ALTER TABLE hosts ADD COLUMN scratch_root text, ADD COLUMN scratch_bytes bigint, ADD COLUMN doubted_at timestamptz;
COMMENT ON COLUMN hosts.scratch_root IS 'the directory, so that others can name its files in jobs';
COMMENT ON COLUMN hosts.scratch_bytes IS 'what batches may fill of it';
COMMENT ON COLUMN hosts.doubted_at IS 'since when it is taken for lost, unless it beats again';

ALTER TABLE batches ADD COLUMN quota bigint, ADD COLUMN dropped_at timestamptz;
COMMENT ON COLUMN batches.quota IS 'bytes of scratch set aside for it on its host';
COMMENT ON COLUMN batches.dropped_at IS 'an operator has accepted that it failed, or what its flags say';
CREATE INDEX batches_archived ON batches (complete_at) WHERE state = 'complete' AND archive_gone_at IS NULL;
CREATE INDEX batches_failed ON batches (failed_at) WHERE state = 'failed' AND dropped_at IS NULL;

ALTER TABLE audio_files ADD COLUMN host text, ADD COLUMN dropped_at timestamptz;
COMMENT ON COLUMN audio_files.host IS 'where it was tried last';
COMMENT ON COLUMN audio_files.dropped_at IS 'an operator has accepted that it is dead';
CREATE INDEX audio_files_dead ON audio_files (batch_id) WHERE state = 'dead' AND dropped_at IS NULL;
CREATE INDEX audio_files_date ON audio_files (date);
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(CHANGES)
