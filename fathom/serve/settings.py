"""What the service allows: addresses, keys and bounds. Every bound exists so that no client can take the rest down."""

from pydantic import Field

from fathom.config.section import Section
from fathom.engine.protocol import Sampling


class ServiceSettings(Section):
    """How the service behaves towards its clients."""

    names: tuple[str, ...] = Field(default=("fathom",), min_length=1)
    """Names that a request's `model` may give; the first is the one in answers."""
    api_keys: tuple[str, ...] = ()
    """Keys that requests must carry one of; with none, everyone who reaches the port may ask."""
    sampling: Sampling = Sampling()
    """How tokens are drawn where a request does not say."""
    allow_origins: tuple[str, ...] = ()
    """Origins (`https://host`) whose web pages may ask, `*` for all; the page that is served here always may."""
    log_requests: bool = False
    """One line for each request on standard error."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Per key; None is no bound."""
    concurrent_requests: int | None = Field(default=None, ge=1)
    """Per key; None is no bound."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1)
    """Longest request body."""
    body_seconds: float = Field(default=60.0, gt=0)
    """A request's headers, and then its body, must have arrived after this long; an answer must be read on as soon."""
    max_connections: int = Field(default=4096, ge=1)
    """Open at once; more are refused."""
    hosts: tuple[str, ...] = ()
    """Names under which the service may be asked (a request's `Host`, without its port); none is any."""
    keep_alive_seconds: float = Field(default=10.0, gt=0)
    """A waiting connection hears from us at least this often."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """After SIGTERM, how long running requests may take to finish."""
    retry_after_seconds: int = Field(default=2, ge=1)
    """What a client that is turned away for load is told to wait."""
