"""Every failure of the application, expected or not, becomes an error object."""

import logging
from collections.abc import Collection

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.serve.errors import ApiError

_LOG = logging.getLogger("fathom.serve")
_SERVED = "/v1/chat/completions, /v1/completions, /v1/models, /health, /metrics"


def install(app: FastAPI) -> None:
    """Answer every failure that `app` expects with an error object; `Mistakes` does it for the others."""

    def api_error(_: Request, error: ApiError) -> JSONResponse:
        return _response(error)

    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        sentences = {
            404: f"{_shown(request)} is not served here; there are {_SERVED}",
            405: f"{request.method} is not allowed at {_shown(request)}",
        }
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = sentences.get(error.status_code, str(error.detail))
        known = ApiError(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)
        return _response(known)

    app.add_exception_handler(ApiError, api_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]


def host_of(address: str) -> str:
    """The host of `host:port`, as it is compared."""
    host = address[: address.find("]") + 1] if address.startswith("[") else address.partition(":")[0]
    return host.rstrip(".").lower()


class Hosts:
    """Middleware that refuses requests for hosts that are not this service's."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        given = next((value for name, value in scope.get("headers", ()) if name == b"host"), None)
        if given is None or host_of(given.decode("latin-1")) in self._hosts:  # browsers always give one
            await self._app(scope, receive, send)
            return
        asked = ascii(given.decode("latin-1")[:100])
        message = f"this service is not {asked}; ask for localhost, or start it with that name's --allow-origin"
        await _response(ApiError(403, message, code="unknown_host"))(scope, receive, send)


class Mistakes:
    """Middleware that tells an exception which nobody foresaw as a 500 without insides.

    Starlette's own place for it is outside of all middleware, where such an answer would go without its headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            if scope["type"] != "http" or started:
                raise
            _LOG.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            mistake = ApiError(500, "the server made a mistake; its log has the details")
            await _response(mistake)(scope, receive, send)


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _shown(request: Request) -> str:
    return repr(request.url.path[:100])
