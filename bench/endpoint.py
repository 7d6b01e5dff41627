"""Where a server that runs already is, and what it wants to know of who asks."""

from __future__ import annotations

import os

from palkernels.bench.errors import UserError

__all__ = ["NO_KEY", "address_of", "api_key"]

NO_KEY = "none"


def address_of(url: str) -> str:
    """Return the address of the server that `--serve` names, with or without the protocol's "/v1".

    Raises:
        UserError: it is no URL.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--serve must begin with http:// or https://, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def api_key() -> str:
    """Return the key that a server may want: what OPENAI_API_KEY holds."""
    return os.environ.get("OPENAI_API_KEY") or NO_KEY
