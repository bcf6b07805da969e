"""HTTP client of an OpenAI-compatible server: time limits, retries, several requests at once.

Redirects are not followed, so that neither text nor a key reaches a host that nobody named.
"""

import asyncio
import json
import random
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2

from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.notices import notify_once
from mlx_dpo.openai_client.address import Address
from mlx_dpo.openai_client.connection import Connection
from mlx_dpo.openai_client.reply import (
    MAX_REPLY_BYTES,
    QUOTA,
    Reply,
    ServerError,
    TransientError,
    UnusableReplyError,
    parse_error,
    parse_models,
    parse_reply,
    retry_after,
)
from mlx_dpo.units import format_bytes

ATTEMPTS = 5
FIRST_DELAY, MAX_DELAY = 1.0, 120.0  # seconds before a retry; a delay doubles with each attempt
CONNECT_SECONDS = 10.0
MAX_UNUSABLE = 3  # unusable replies in a row after which the server is given up
RETRIED_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504, 529}
UNSUPPORTED = {"unsupported_parameter", "unsupported_value"}  # codes of OpenAI
REPLACED = {"max_tokens": "max_completion_tokens"}  # fields of OpenAI's newer models
OPTIONAL = ("temperature", "top_p", "seed")  # fields that a server may leave to itself

Body = dict[str, Any]
Save = Callable[[int, Reply], None]  # takes the number of the request
Result = TypeVar("Result")


class ApiClient:
    """A client of one server.

    Args:
        address: address of the server.
        connection: time limits, API key and number of requests at a time.
    """

    def __init__(self, address: Address, connection: Connection) -> None:
        self.address, self._connection = address, connection
        self._unusable = 0  # unusable replies since the last usable one
        self._unsupported: set[str] = set()  # fields that the server has refused
        self._resume_at = 0.0  # the server takes no request before this time of the event loop

    def list_models(self) -> list[dict[str, Any]] | None:
        """Return the models that the server lists; None if it has no list.

        Raises:
            ModelError: the server cannot be reached, or refuses the request.
        """
        try:
            return run_coroutine(self._list_models())
        except UnusableReplyError as error:
            raise self._error(f"{error}; is this the address of an API? Most end in /v1") from None
        except TransientError as error:
            raise self._error(f"{error}; start the server, or fix the address") from None

    def complete(self, bodies: Sequence[Body], save: Save) -> None:
        """Send chat requests, and pass each reply to `save` as soon as it has arrived.

        A reply that is no answer after all attempts is saved as an empty text, and counted.

        Raises:
            ModelError: the server cannot be reached or refuses a request, or several replies in a
                row were no answers. The replies that had arrived are saved.
        """
        try:
            run_coroutine(self._complete_all(bodies, save))
        except ExceptionGroup as group:
            error = _first(group)
            if not isinstance(error, TransientError):
                raise error from None
            raise self._error(f"{error} ({ATTEMPTS} attempts)") from None

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self.address}: {self._hide_key(what)}")

    def _hide_key(self, text: str) -> str:
        """Return a text of the server without the API key, which it may quote."""
        key = self._connection.api_key(self.address)
        return text.replace(key, "***") if key else text

    def _open(self) -> httpx2.AsyncClient:
        headers = {"Accept-Encoding": "identity", "User-Agent": "mlx-dpo"}
        if key := self._connection.api_key(self.address):
            headers["Authorization"] = f"Bearer {key}"
        seconds = self._connection.request_timeout
        return httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
            limits=httpx2.Limits(max_connections=self._connection.max_concurrency),
            follow_redirects=False,
            # Plain http needs no certificates, and loading them takes time for each client. Without
            # any, no encrypted connection would be trusted.
            verify=True if self.address.is_encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            # A proxy of the environment would get what is meant for this machine or network.
            trust_env=self.address.is_encrypted and not self.address.is_loopback,
        )

    async def _list_models(self) -> list[dict[str, Any]] | None:
        async with self._open() as client:
            status, _, data = await self._send(client, "GET", "/models")
        if status in (404, 405, 501):
            return None
        self._check_status(status, data)
        return parse_models(data)

    async def _complete_all(self, bodies: Sequence[Body], save: Save) -> None:
        waiting = iter(enumerate(bodies))

        async def work(client: httpx2.AsyncClient) -> None:
            for number, body in waiting:
                save(number, await self._complete(client, body))

        async with self._open() as client, asyncio.TaskGroup() as group:
            for _ in range(min(self._connection.max_concurrency, len(bodies))):
                group.create_task(work(client))

    async def _complete(self, client: httpx2.AsyncClient, body: Body) -> Reply:
        """Return the reply to one request, after retries if necessary."""
        for attempt in range(1, ATTEMPTS + 1):
            await self._wait()
            try:
                reply = await self._attempt(client, body)
            except TransientError as error:
                # A cancelled read may end as an error of the connection; a retry would go on.
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise asyncio.CancelledError from error
                if attempt == ATTEMPTS:
                    return self._give_up(error)
                self._connection.counts.add(retries=1)
                delay = FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                await self._delay(delay, error)
            else:
                self._unusable = 0
                return reply
        raise AssertionError

    def _give_up(self, error: TransientError) -> Reply:
        """Return an empty reply for unusable ones; raise the error if it is another or too many."""
        self._unusable += 1
        if not isinstance(error, UnusableReplyError) or self._unusable >= MAX_UNUSABLE:
            raise error
        self._connection.counts.add(unusable=1)
        return Reply("", "stop", is_usable=False)

    async def _delay(self, delay: float, error: TransientError) -> None:
        """Wait before a retry; after a Retry-After, no other request is sent either."""
        if error.wait is None:
            await asyncio.sleep(delay)
            return
        if error.wait > MAX_DELAY:
            raise self._error(
                f"{error}, and asks to wait {error.wait:,.0f} seconds; try again then"
            )
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + error.wait)

    async def _wait(self) -> None:
        while (rest := self._resume_at - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(rest)

    async def _attempt(self, client: httpx2.AsyncClient, body: Body) -> Reply:
        while True:
            content = self._supported(body)
            status, headers, data = await self._send(client, "POST", "/chat/completions", content)
            if status not in (400, 422) or not self._leave_out(parse_error(data), content):
                break
        self._check_status(status, data, headers.get("retry-after"))
        return parse_reply(data)

    def _supported(self, body: Body) -> Body:
        """Return the fields of a request that the server takes."""
        names = {name: REPLACED.get(name) for name in self._unsupported}
        renamed = {names.get(name, name): value for name, value in body.items()}
        return {name: value for name, value in renamed.items() if name is not None}

    def _leave_out(self, error: ServerError, body: Body) -> bool:
        """Return whether the server refused a field that the next request can do without."""
        name = error.param
        if name is None or error.code not in UNSUPPORTED or name not in body:
            return False
        if name not in REPLACED and name not in OPTIONAL:
            return False
        self._unsupported.add(name)
        if name in OPTIONAL:
            notify_once(f"{self.address}: the server takes no `{name}`, so its own value is used")
        return True

    def _check_status(self, status: int, data: bytes, wait: str | None = None) -> None:
        """Raise an error unless the status is 200."""
        if status == 200:
            return
        error = parse_error(data)
        found = f"status {status}" + (f", {error.message}" if error.message else "")
        if status in RETRIED_STATUSES and error.code != QUOTA:
            raise TransientError(f"the server is busy or failed ({found})", retry_after(wait))
        raise self._error(f"the server refused the request ({found}); {_advice(status)}")

    async def _send(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Body | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Send one request; return the status, the headers and the body of the reply.

        Raises:
            TransientError: there was no connection or no whole reply in time.
            UnusableReplyError: the reply is longer than `MAX_REPLY_BYTES`.
            ModelError: the reply is a redirect.
        """
        url, content = self.address.url + path, None
        headers = {}
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
            self._connection.counts.add(requests=1, sent_bytes=len(content))
        try:
            async with (
                asyncio.timeout(self._connection.request_timeout),
                client.stream(method, url, content=content, headers=headers) as response,
            ):
                if response.is_redirect:
                    raise self._redirected(response)
                data = bytearray()
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > MAX_REPLY_BYTES:
                        raise UnusableReplyError(
                            f"the reply is longer than {format_bytes(MAX_REPLY_BYTES)}"
                        )
                return response.status_code, response.headers, bytes(data)
        except (TimeoutError, httpx2.TimeoutException):
            raise TransientError(
                f"no answer within {self._connection.request_timeout:g} seconds (--request-timeout)"
            ) from None
        except httpx2.RequestError as error:
            raise TransientError(f"no answer ({reason(error)})") from None

    def _redirected(self, response: httpx2.Response) -> ModelError:
        target = response.headers.get("location", "nowhere")
        return self._error(
            f"the server redirects to {target}, and redirects are not followed; give the final "
            "address"
        )


def _advice(status: int) -> str:
    if status in (401, 403):
        return "give the name of a variable with the API key by --api-key-env"
    if status == 404:
        return "check the address, which mostly ends in /v1, and the name of the model"
    if status == 429:
        return "raise the quota of the account"
    return "fix what it names"


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the first error in a group of errors; one is enough for a message."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end; Ctrl-C cancels it at once.

    A notebook has an event loop on its thread; there, the coroutine runs on another thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    loop = asyncio.new_event_loop()

    def run() -> Result:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(coroutine)

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        try:
            return future.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(cancel)
            raise
