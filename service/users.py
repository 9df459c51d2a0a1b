"""Users and their API keys. A key is 256 random bits; the database holds its SHA-256 only."""

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db import now
from service.errors import Conflict, NotFound, Unauthorized
from service.models import ApiKey, User, new_id

_PREFIX = "luthier_"


@dataclass(frozen=True)
class Principal:
    """Who makes a request."""

    user_id: str
    key_id: str


def create_user(session: Session, name: str) -> User:
    """Raises Conflict when the name is taken."""
    user = User(id=new_id("user"), name=name)
    try:
        with session.begin_nested():
            session.add(user)
    except IntegrityError:
        raise Conflict(f"there is a user named {name!r} already", param="name") from None
    return user


def user_by_name(session: Session, name: str) -> User | None:
    return session.scalar(select(User).where(User.name == name))


def create_key(session: Session, user_id: str) -> str:
    """A new key, returned this once."""
    # A fast hash is right here: 256 random bits cannot be guessed, unlike a password.
    key = _PREFIX + secrets.token_urlsafe(32)
    session.add(ApiKey(id=new_id("key"), user_id=user_id, sha256=_digest(key), hint=key[: len(_PREFIX) + 4]))
    session.flush()
    return key


def keys(session: Session) -> list[tuple[ApiKey, str]]:
    """Every key with its user's name."""
    rows = session.execute(select(ApiKey, User.name).join(User).order_by(ApiKey.id)).all()
    return [(row[0], row[1]) for row in rows]


def revoke_key(session: Session, key_id: str) -> None:
    """From the commit on the key opens nothing."""
    changed = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=now())
    if not session.execute(changed.returning(ApiKey.id)).first():
        raise NotFound(f"no live key {key_id}")


def authenticate(session: Session, key: str | None) -> Principal:
    """Who holds `key`. Unknown, revoked and malformed keys get one and the same answer, after the same work."""
    well_formed = key is not None and key.startswith(_PREFIX) and len(key) < 200 and key.isascii()
    sha256 = _digest(key if key is not None and well_formed else _PREFIX)
    rows = select(ApiKey.id, ApiKey.user_id).where(ApiKey.sha256 == sha256, ApiKey.revoked_at.is_(None))
    row = session.execute(rows).first()
    if row and well_formed:
        return Principal(row.user_id, row.id)
    raise Unauthorized("a valid API key is needed: send it as 'Authorization: Bearer luthier_…'")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
