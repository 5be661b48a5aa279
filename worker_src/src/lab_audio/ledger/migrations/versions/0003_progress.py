"""What is asked of batches by people, alerts and gates: one definition for `status`, batch_status and metrics."""

from alembic import op

revision = "0003"
down_revision = "0002"

VIEWS = """
CREATE VIEW batch_progress AS
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
        coalesce(b.minted_at, b.uploaded_at) AS entered_at,
        s.since,
        greatest(s.since, i.settled_at) AS last_progress_at,
        CASE WHEN b.state = 'ready' AND i.settled_at > b.ready_at
            THEN i.settled_here / extract(epoch FROM i.settled_at - b.ready_at)::float END AS rate
    FROM batches b
    CROSS JOIN LATERAL (
        SELECT CASE b.state WHEN 'minted' THEN b.minted_at WHEN 'uploaded' THEN b.uploaded_at
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
COMMENT ON VIEW batch_progress IS
    'total: recordings, or what the job promised until they are known; rate: recordings a second since it is ready';

CREATE FUNCTION stuck_batches(after interval) RETURNS TABLE (batch_id text, severity text, reason text)
LANGUAGE sql STABLE AS $$
    SELECT p.batch_id,
        CASE WHEN p.last_progress_at <= now() - after THEN 'critical' ELSE 'warning' END,
        CASE WHEN p.last_progress_at <= now() - after
            THEN 'no progress for ' || round(p.idle_seconds) || ' s'
            ELSE 'not complete after ' || round(p.age_seconds) || ' s' END
        || '; it is ' || p.state || ' and waits for '
        || CASE p.state
            WHEN 'minted' THEN 'the transfer worker of its source'
            WHEN 'uploaded' THEN 'an unpack worker with room on its scratch'
            WHEN 'unpacking' THEN 'the unpack worker on ' || p.host
            WHEN 'ready' THEN 'the GPU worker on ' || p.host
            ELSE p.host || ' to remove its scratch' END
        || CASE WHEN p.host IS NULL THEN ''
            WHEN h.seen IS NULL THEN ', which was never seen'
            ELSE ', seen ' || round(extract(epoch FROM now() - h.seen)) || ' s ago' END
    FROM batch_progress p
    CROSS JOIN LATERAL (
        SELECT max(CASE p.state WHEN 'ready' THEN gpu_seen_at ELSE seen_at END) AS seen FROM hosts WHERE host = p.host
    ) h
    WHERE p.open AND least(p.entered_at, p.last_progress_at) <= now() - after
    ORDER BY p.last_progress_at
$$;
COMMENT ON FUNCTION stuck_batches IS 'warning: open for so long; critical: without any progress for so long';
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(VIEWS)
