"""Run by alembic inside the transaction that `lab_audio.ledger.migrate` holds.

Revisions are four digits, in order. A migration leaves what the release before it uses, for that one works on beside it
and may be gone back to: it adds, and what is no longer used goes one release later.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
