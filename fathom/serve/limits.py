"""Who may ask, and how much at once."""

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fathom.serve.errors import ApiError
from fathom.serve.settings import ServiceSettings


@dataclass
class Client:
    """One key's account. Without keys, everyone shares one."""

    cache_salt: str
    allowance: float
    """Requests that may come at once; grows with time up to a minute's worth."""
    counted_at: float
    running: int = 0


class Gate:
    """Checks keys and keeps each within its limits."""

    def __init__(self, settings: ServiceSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._digests = [_digest(key.encode()) for key in settings.api_keys]
        salts = [hashlib.sha256(b"fathom cache salt" + digest).hexdigest()[:16] for digest in self._digests] or [""]
        full = float(settings.requests_per_minute or 0)
        self._clients = [Client(salt, full, clock()) for salt in salts]

    def identify(self, authorizations: Sequence[str]) -> Client:
        """Whose key the one `Authorization` header holds. Raises `ApiError` (401).

        Every key is compared, and in a time that does not tell how much of it was right.
        """
        if not self._digests:
            return self._clients[0]
        scheme, _, key = (authorizations[0] if len(authorizations) == 1 else "").partition(" ")
        given = _digest(key.strip().encode("latin-1", "replace"))
        found = None
        for client, digest in zip(self._clients, self._digests, strict=True):
            if hmac.compare_digest(given, digest):
                found = client
        if scheme.lower() != "bearer" or found is None:
            reasons = ("an API key is needed", "the API key is not known here", "there are several API keys")
            reason = reasons[min(len(authorizations), 2)]
            message = f"{reason}; send 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    def enter(self, client: Client) -> Callable[[], None]:
        """Count a request; what is returned says, once, that it has ended. Raises `ApiError` (429)."""
        limit = self._settings.concurrent_requests
        if limit is not None and client.running >= limit:
            message = f"this key has {client.running} requests running, which is its limit; wait for one to end"
            raise _too_many(message, self._settings.retry_after_seconds)
        self._count(client)
        client.running += 1
        left = False

        def leave() -> None:
            nonlocal left
            client.running -= not left
            left = True

        return leave

    def _count(self, client: Client) -> None:
        per_minute = self._settings.requests_per_minute
        if per_minute is None:
            return
        now = self._clock()
        grown = client.allowance + (now - client.counted_at) * per_minute / 60
        client.allowance, client.counted_at = min(grown, float(per_minute)), now
        if client.allowance < 1:
            wait = math.ceil((1 - client.allowance) * 60 / per_minute)
            raise _too_many(f"this key may make {per_minute} requests a minute; wait {wait} s", wait)
        client.allowance -= 1


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _too_many(message: str, wait: int) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})
