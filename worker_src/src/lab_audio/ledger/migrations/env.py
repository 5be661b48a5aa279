"""Run by alembic inside the transaction that `lab_audio.ledger.migrate` holds."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
