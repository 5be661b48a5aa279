"""The ledger, made anew or around the older system's audio_files, transcripts and classifications.

Rows that are there stay: they count as done. Columns that only the older system fills become nullable.
"""

from alembic import op
from sqlalchemy import inspect

from lab_audio.errors import Fatal

revision = "0001"
down_revision = None

COLUMNS = {
    "audio_files": [
        "batch_id text",
        "member text",
        "item text",
        "original_filename text",
        "state text NOT NULL DEFAULT 'done' CHECK (state IN ('pending', 'done', 'dead'))",
        "attempts integer NOT NULL DEFAULT 0",
        "reason text",
        "date date",
        "s3_opus_path text",
        "seconds double precision",
        "created_at timestamptz DEFAULT now()",
        "settled_at timestamptz",
    ],
    "transcripts": [
        "text text",
        "language text",
        "segments jsonb",
        "speech boolean",
        "model text",
        "created_at timestamptz DEFAULT now()",
    ],
    "classifications": [
        "policy text",
        "policy_sha256 text",
        "label text",
        "score double precision",
        "model text",
        "adapter text",
        "chunks jsonb",
        "created_at timestamptz DEFAULT now()",
    ],
}

TABLES = """
CREATE TABLE hosts (
    host text PRIMARY KEY,
    seen_at timestamptz,
    gpu_seen_at timestamptz,
    paused boolean NOT NULL DEFAULT false,
    scratch_id text
);
COMMENT ON COLUMN hosts.scratch_id IS 'random name of the disk under SCRATCH_ROOT';

CREATE TABLE batches (
    batch_id text PRIMARY KEY CHECK (batch_id ~ '^[0-9]{8}-[0-9]{6}-[0-9a-f]{6}$'),
    state text NOT NULL CHECK (state IN ('minted', 'uploaded', 'unpacking', 'ready', 'complete', 'failed')),
    reason text,
    flags text[] NOT NULL DEFAULT '{}',
    attempts integer NOT NULL DEFAULT 0,
    host text,
    job text,
    source text,
    sha256 text,
    size bigint,
    file_count integer,
    minted_at timestamptz,
    uploaded_at timestamptz,
    unpacking_at timestamptz,
    ready_at timestamptz,
    complete_at timestamptz,
    failed_at timestamptz,
    archive_gone_at timestamptz
);
COMMENT ON COLUMN batches.host IS 'set while something of the batch may lie on that host''s disk';
COMMENT ON COLUMN batches.job IS 'the unpack job, byte for byte as pushed';
CREATE INDEX batches_open ON batches (state) WHERE state IN ('minted', 'uploaded', 'unpacking', 'ready');
CREATE INDEX batches_host ON batches (host) WHERE host IS NOT NULL;

CREATE TABLE source_files (
    source_file_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id text NOT NULL REFERENCES batches,
    source text NOT NULL,
    path bytea NOT NULL,
    size bigint NOT NULL,
    mtime_ns bigint NOT NULL,
    struck text,
    fate_at timestamptz
);
COMMENT ON COLUMN source_files.path IS 'bytes, for names need not be UTF-8: convert_from(path, ''UTF8'')';
COMMENT ON COLUMN source_files.struck IS 'why it was left out of its batch; it may then be minted again';
CREATE UNIQUE INDEX source_files_once ON source_files (source, path, size, mtime_ns) WHERE struck IS NULL;
CREATE INDEX source_files_batch ON source_files (batch_id);
CREATE INDEX source_files_fate ON source_files (source) WHERE fate_at IS NULL AND struck IS NULL;

ALTER TABLE audio_files ALTER COLUMN state SET DEFAULT 'pending';
ALTER TABLE audio_files ADD CONSTRAINT audio_files_batch FOREIGN KEY (batch_id) REFERENCES batches NOT VALID;
CREATE UNIQUE INDEX audio_files_member ON audio_files (batch_id, member);
CREATE UNIQUE INDEX audio_files_item ON audio_files (batch_id, item);
CREATE UNIQUE INDEX transcripts_once ON transcripts (audio_id) WHERE model IS NOT NULL;
CREATE UNIQUE INDEX classifications_once ON classifications (audio_id, policy) WHERE policy_sha256 IS NOT NULL;
"""


def rename_key(table: str, column: str) -> None:
    if column != "audio_id":
        op.execute(f'ALTER TABLE {table} RENAME COLUMN "{column}" TO audio_id')


def keep_older(table: str) -> None:
    """Make a table of the older system fit: its key to audio_files is called audio_id, and nothing else is demanded."""
    inspector = inspect(op.get_bind())
    key = inspector.get_pk_constraint(table)["constrained_columns"]
    names = [column["name"] for column in inspector.get_columns(table)]
    if table == "audio_files":
        if len(key) != 1:
            raise Fatal("the older audio_files has no primary key of one column; give it one, then migrate again")
        rename_key(table, key[0])
    elif "audio_id" not in names:
        foreign = [
            k["constrained_columns"] for k in inspector.get_foreign_keys(table) if k["referred_table"] == "audio_files"
        ]
        if len(foreign) != 1 or len(foreign[0]) != 1:
            raise Fatal(f"the older {table} has no column audio_id and no foreign key to audio_files")
        rename_key(table, foreign[0][0])
    for column in inspect(op.get_bind()).get_columns(table):
        if column["name"] not in (*key, "audio_id") and not column["nullable"] and column["default"] is None:
            op.execute(f'ALTER TABLE {table} ALTER COLUMN "{column["name"]}" DROP NOT NULL')


def upgrade() -> None:
    there = inspect(op.get_bind()).get_table_names()
    for table, columns in COLUMNS.items():
        if table in there:
            keep_older(table)
        elif table == "audio_files":
            op.execute("CREATE TABLE audio_files (audio_id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY)")
        else:
            op.execute(
                f"CREATE TABLE {table} ({table[:-1]}_id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,"
                " audio_id bigint NOT NULL REFERENCES audio_files)"
            )
        for column in columns:
            op.execute(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {column}")
    op.get_bind().exec_driver_sql(TABLES)
    for table in ("transcripts", "classifications"):
        op.execute(f"CREATE INDEX IF NOT EXISTS {table}_audio ON {table} (audio_id)")
