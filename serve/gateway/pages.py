"""Pages for people: the experiments, with pictures. Plain files; what they show they ask of the API."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from serve.gateway.generation import Services

FILES = Path(__file__).parent / "console"
TYPES = {"experiments.css": "text/css", "experiments.js": "text/javascript", "charts.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router(_: Services) -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.get("/experiments")
    @routes.get("/experiments/{name}")
    async def page(name: str = "") -> Response:
        return FileResponse(FILES / "experiments.html", media_type="text/html", headers=HEADERS)

    def add(name: str, kind: str) -> None:
        @routes.get(f"/console/{name}")
        async def file() -> Response:
            return FileResponse(FILES / name, media_type=kind, headers=HEADERS)

    for name, kind in TYPES.items():
        add(name, kind)
    return routes
