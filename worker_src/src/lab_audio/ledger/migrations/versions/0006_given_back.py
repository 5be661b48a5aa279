"""A batch that was given back waits since it was last taken, one that is tried again since then; a look at a source is
kept by the source's name.
"""

from alembic import op

revision = "0006"
down_revision = "0005"

CHANGES = """
CREATE OR REPLACE VIEW batch_progress AS
SELECT *,
    round(100.0 * processed / nullif(total, 0), 1)::float AS percent,
    CASE WHEN rate > 0 THEN pending / rate END AS eta_seconds,
    extract(epoch FROM now() - entered_at)::float AS age_seconds,
    extract(epoch FROM now() - last_progress_at)::float AS idle_seconds
FROM (
    SELECT b.batch_id, b.state, b.host, b.flags, b.reason,
        b.state IN ('minted', 'uploaded', 'unpacking', 'ready') OR b.host IS NOT NULL AS open,
        greatest(i.items, CASE WHEN b.ready_at IS NULL THEN coalesce(b.file_count, 0) END) AS total,
        i.done + i.dead AS processed, i.done, i.dead, i.items - i.done - i.dead AS pending,
        coalesce(b.uploaded_at, b.minted_at) AS entered_at,
        s.since,
        greatest(s.since, i.settled_at) AS last_progress_at,
        CASE WHEN b.state = 'ready' AND i.settled_at > b.ready_at
            THEN i.settled_here / extract(epoch FROM i.settled_at - b.ready_at)::float END AS rate
    FROM batches b
    CROSS JOIN LATERAL (
        SELECT CASE b.state WHEN 'minted' THEN b.minted_at WHEN 'uploaded' THEN greatest(b.uploaded_at, b.unpacking_at)
            WHEN 'unpacking' THEN b.unpacking_at WHEN 'ready' THEN b.ready_at
            WHEN 'complete' THEN b.complete_at ELSE b.failed_at END AS since
    ) s
    CROSS JOIN LATERAL (
        SELECT count(*) AS items,
            count(*) FILTER (WHERE a.state = 'done') AS done,
            count(*) FILTER (WHERE a.state = 'dead') AS dead,
            count(*) FILTER (WHERE a.settled_at > b.ready_at) AS settled_here,
            max(a.settled_at) AS settled_at
        FROM audio_files a WHERE a.batch_id = b.batch_id
    ) i
) counted;

DELETE FROM runs WHERE job = 'source';
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(CHANGES)
