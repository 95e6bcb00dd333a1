"""/docs: all routes to read and to try, by Swagger UI over /openapi.json.

Its files come from this machine (package fastapi-offline): it works without the internet, and no script of another
host runs beside somebody's session. Test: pytest tests/test_api_docs.py
"""

from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from jobs import csp

FOLDER = files("fastapi_offline") / "static"
# Addresses are relative, for the prefix of a proxy. Without validatorUrl, another server would be told of ours.
PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Moonreel API</title>
<link rel="icon" href="favicon.ico">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });</script>
</body>
</html>
"""

docs_router = APIRouter(include_in_schema=False)


@docs_router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> Response:
    return Response(PAGE, media_type="text/html", headers={"Content-Security-Policy": csp.for_docs(PAGE)})


@docs_router.get("/docs/swagger-ui.css")
async def styles() -> Response:
    return FileResponse(str(FOLDER / "swagger-ui.css"), media_type="text/css")


@docs_router.get("/docs/swagger-ui-bundle.js")
async def script() -> Response:
    return FileResponse(str(FOLDER / "swagger-ui-bundle.js"), media_type="text/javascript")
