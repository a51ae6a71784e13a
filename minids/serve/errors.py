"""Errors in OpenAI's shape."""

import json

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets an error; param: the field that is not valid, code: for programs."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> bytes:
        """Return the error as JSON."""
        kind = KINDS.get(self.status,
                         "server_error" if self.status >= 500 else "invalid_request_error")
        error = dict(message=str(self), type=kind, param=self.param, code=self.code)
        return json.dumps({"error": error}).encode()


def invalid(param: str, message: str, code: str | None = None) -> Refused:
    """Return the refusal of a field's value."""
    return Refused(400, f"{param}: {message}", param, code)
