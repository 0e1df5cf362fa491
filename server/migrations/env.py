"""Alembic's environment: migrations run on the connection that ``server/store.py`` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
context.run_migrations()
