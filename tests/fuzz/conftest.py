"""One site on PostgreSQL, which refuses more than SQLite does."""

from tests.service.conftest import shared_site

__all__ = ["shared_site"]
