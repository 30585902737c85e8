"""What every request passes first: Host name, API key, its share of memory, and the numbers it leaves behind."""

import hmac
import time
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.serving.errors import ApiError, brief
from chiasm.serving.served import Shared

GUARDED = ("/v1/", "/api/", "/metrics")
SECURITY = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Gate:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, shared: Shared) -> None:
        self.app, self.shared = app, shared
        self._keys = [key.encode() for key in shared.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics, started, status = self.shared.metrics, time.monotonic(), 499
        lease = scope["chiasm.lease"] = self.shared.budget.lease()

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *SECURITY.items()]}
            await send(message)

        metrics.open.inc()
        try:
            refusal = self._refusal(scope)
            answer: ASGIApp = self.app if refusal is None else refusal.response()
            await answer(scope, receive, tell)
        except Exception:
            status = 500
            raise
        finally:
            lease.release()
            metrics.open.dec()
            path = getattr(scope.get("route"), "path", "other")
            metrics.requests.labels(path, str(status)).inc()
            metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        hosts = self.shared.settings.hosts
        if hosts is not None and (host := _host(headers.get(b"host", b""))) not in hosts:
            host = brief(host)
            return ApiError(
                403,
                f"this server does not answer to the name {host!r}; start it with --allowed-host {host or 'NAME'}",
                code="host_not_allowed",
            )
        if not self._keys or not scope["path"].startswith(GUARDED) or scope["method"] == "OPTIONS":
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() == b"bearer" and any(known):
            return None
        message = (
            "Incorrect API key provided." if given else "You didn't provide an API key: Authorization: Bearer KEY."
        )
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _host(value: bytes) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{value.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""
