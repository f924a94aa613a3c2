"""An id and a time of arrival for every request."""

from __future__ import annotations

import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestId:
    """ASGI middleware: an id for every request, in `scope["state"]["request_id"]` and the answer's
    x-request-id.

    Serve's proxy gives requests an id too and puts it into the answer itself; then that one is used.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with an id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id")
        request_id = uuid.uuid4().hex if given is None else given.decode("latin-1")
        scope.setdefault("state", {}).update(request_id=request_id, arrived=time.perf_counter())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and given is None:
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)
