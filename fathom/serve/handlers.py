"""Every failure of the application, expected or not, becomes an error object."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fathom.serve.errors import ApiError

_LOG = logging.getLogger("fathom.serve")


def install(app: FastAPI) -> None:
    """Answer every failure of `app`, expected or not, with an error object."""

    def api_error(_: Request, error: ApiError) -> JSONResponse:
        return _response(error)

    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        sentences = {
            404: f"there is nothing at {_shown(request)}; the API is under /v1",
            405: f"{request.method} is not allowed at {_shown(request)}",
        }
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = sentences.get(error.status_code, str(error.detail))
        known = ApiError(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)
        return _response(known)

    def mistake_of_ours(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _response(ApiError(500, "the server made a mistake; its log has the details"))

    app.add_exception_handler(ApiError, api_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, mistake_of_ours)


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _shown(request: Request) -> str:
    return repr(request.url.path[:100])
