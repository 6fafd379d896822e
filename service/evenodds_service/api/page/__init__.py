"""The operator's page: static files, without a build step and without the internet. Its figures come over HTTP."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, HTTPException, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

DOCS_FILES = "/docs-files"
docs_files = StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")
"""Swagger UI, which else would come from the internet."""

_FOLDER = Path(__file__).parent
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
FILES = {
    path.relative_to(_FOLDER).as_posix(): path.read_bytes() for path in _FOLDER.rglob("*") if path.suffix in MEDIA_TYPES
}
"""uPlot draws the charts; its licence stands beside it. In memory, since a first look asks for a dozen of them."""
_HEADERS = {
    # What stands in a prompt must not run, whatever the page does with it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def index() -> Response:
    """The page itself."""
    return _file("index.html", "text/html")


@router.get("/docs")
def documentation() -> Response:
    """The interface to read and try, by addresses that are relative, so that they hold under any prefix."""
    files = DOCS_FILES.removeprefix("/")
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Even Odds",
        swagger_js_url=f"{files}/swagger-ui-bundle.js",
        swagger_css_url=f"{files}/swagger-ui.css",
        swagger_favicon_url=f"{files}/favicon.png",
    )


@router.get("/openapi.json")
def description(request: Request) -> Response:
    """What the interface is, and under which prefix it stands."""
    document = request.app.openapi()
    if prefix := request.state.prefix:
        document = {**document, "servers": [{"url": prefix}]}
    return JSONResponse(document)


@router.get("/page/{name:path}")
async def file(name: str) -> Response:
    """What the page is made of."""
    if name not in FILES:
        raise HTTPException(404)
    return _file(name, MEDIA_TYPES[Path(name).suffix])


def _file(name: str, media_type: str) -> Response:
    return Response(FILES[name], media_type=media_type, headers=_HEADERS)
