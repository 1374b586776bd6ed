"""What the service allows: addresses, keys and bounds. Every bound exists so that no client can take the rest down."""

from pydantic import Field

from fathom.config.section import Section


class ServiceSettings(Section):
    """How the service behaves towards its clients."""

    names: tuple[str, ...] = Field(default=("fathom",), min_length=1)
    """Names that a request's `model` may give; the first is the one in answers."""
    api_keys: tuple[str, ...] = ()
    """Keys that requests must carry one of; with none, everyone who reaches the port may ask."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Per key; None is no bound."""
    concurrent_requests: int | None = Field(default=None, ge=1)
    """Per key; None is no bound."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1)
    """Longest request body."""
    body_seconds: float = Field(default=60.0, gt=0)
    """A body must have arrived after this long."""
    keep_alive_seconds: float = Field(default=10.0, gt=0)
    """A waiting connection hears from us at least this often."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """After SIGTERM, how long running requests may take to finish."""
    retry_after_seconds: int = Field(default=2, ge=1)
    """What a client that is turned away for load is told to wait."""
