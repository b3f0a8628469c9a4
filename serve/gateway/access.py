"""Who may call a route, as FastAPI dependencies. ``IdentityMiddleware`` has said who asks."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from serve.identity import Identity, Scope


def who(request: Request) -> Identity:
    identity: Identity = request.state.identity
    return identity


Who = Annotated[Identity, Depends(who)]


def needs(*scopes: Scope) -> Any:
    """A dependency that refuses, with 403, a key that has none of ``scopes``; the last one is what it asks for."""

    def check(identity: Who) -> None:
        if not set(scopes[:-1]) & identity.scopes:
            identity.check(scopes[-1])

    return Depends(check)


def reaches_named(request: Request, identity: Who) -> None:
    """A dependency that refuses, with 403, a key that does not reach the adapter that the path names."""
    if (name := request.path_params.get("name")) is not None:
        identity.check_adapter(name)
