"""GET /v1/demonstration.tif returns a small synthetic scene to try a translator with."""

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from app.errors import ErrorAnswer
from app.media.geotiff import import_rasterio
from app.requests.bodies import BINARY

router = APIRouter(tags=["images"])


@router.get(
    "/v1/demonstration.tif",
    response_class=FileResponse,
    responses={
        200: {"content": {"image/tiff": {"schema": BINARY}}},
        501: {"model": ErrorAnswer, "description": "rasterio is not installed here."},
    },
    summary="A scene to try",
)
async def get(request: Request) -> FileResponse:
    """Return a georeferenced GeoTIFF of synthetic backscatter, always the same."""
    import_rasterio()
    path: Path = request.app.state.scenes.scratch / "demonstration.tif"
    if not path.exists():
        await asyncio.to_thread(_make, path)
    return FileResponse(path, media_type="image/tiff", filename=path.name)


def _make(path: Path) -> None:
    """Write the scene beside its place and rename it, so that no other request reads half of it."""
    import tempfile

    from distillers.sar.demonstration import demonstration

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        demonstration(Path(folder) / path.name)
        (Path(folder) / path.name).replace(path)
