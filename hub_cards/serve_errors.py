"""Errors in OpenAI's format. Imports neither torch nor the model."""

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse


class RequestError(Exception):
    """An error reported to the client in OpenAI's format.

    Args:
        message: the problem, with the values involved.
        param: name of the invalid field, such as `messages.0.content`.
        status: status of the HTTP response.
        code: OpenAI's error code, for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


# Each error is a new one, since an error that is raised keeps its tracebacks.


def internal() -> RequestError:
    """The error of a failure that reveals no details."""
    return RequestError("internal server error: see the server log", status=500)


def disconnected() -> RequestError:
    """The error of a request without a client."""
    return RequestError("client disconnected", status=499)


def closing() -> RequestError:
    """The error of requests to a server that is shutting down."""
    return RequestError("the server is shutting down: try another one", status=503, code="shutting_down")


def error_body(error: RequestError) -> dict:
    """Response body of an error, in OpenAI's format."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """Response of an error, in OpenAI's format."""
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error_body(error), error.status, headers)


def handle(request: Request, error: Exception) -> JSONResponse:
    """Response of any error; unexpected ones reveal no details."""
    if isinstance(error, HTTPException):
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    elif isinstance(error, ClientDisconnect):
        error = disconnected()
    return error_response(error if isinstance(error, RequestError) else internal())


# Of a Starlette or FastAPI application.
HANDLERS = dict.fromkeys((RequestError, HTTPException, ClientDisconnect, Exception), handle)
