"""Asks a running server what only Evener servers tell; every way in which it may not answer, with the remedy."""

from typing import Any

import httpx

from evener.errors import InvalidInput, Unavailable


class Server:
    """One server, by its URL."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float = 10.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise InvalidInput(f"{url!r} is no URL of a server; write it like http://127.0.0.1:8000")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.Client(headers=headers, timeout=timeout_s)
            httpx.URL(self.url)
        except (httpx.InvalidURL, ValueError, UnicodeError) as error:
            raise InvalidInput(f"{url!r} is no URL of a server ({error}); write it like http://host:8000") from error

    def get(self, path: str, asked: dict[str, str]) -> Any:
        """The JSON that `path` (`/ledger`) answers. Raises Unavailable or InvalidInput with the remedy."""
        try:
            reply = self._client.get(f"{self.url}{path}", params=asked)
            body = reply.json()
        except httpx.HTTPError as error:
            raise Unavailable(
                f"no answer from {self.url} ({error or type(error).__name__}); is `evener serve` running there?"
            ) from error
        except ValueError:
            raise Unavailable(f"{self.url}{path} does not answer JSON; is it an Evener server?") from None
        if reply.status_code == 200:
            return body
        detail = body.get("error") if isinstance(body, dict) else None
        message = detail.get("message") if isinstance(detail, dict) else None
        if reply.status_code == 404 and not (message or "").startswith("request"):
            raise Unavailable(f"{self.url} has no {path} (404); is it an Evener server of this version?")
        if reply.status_code == 401:
            raise InvalidInput(f"{self.url} asks for an API key; give it with --api-key or EVENER_API_KEY")
        if reply.status_code == 400:
            raise InvalidInput(f"{self.url}: {message}")
        raise Unavailable(f"{self.url} answers {reply.status_code}: {message or reply.reason_phrase}")
