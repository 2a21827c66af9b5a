"""Serve by FastAPI as tutorials do: the forward pass in the handler, one picture at a time."""

import uvicorn
from fastapi import FastAPI, Request, Response
from work import PORT, Work, png

work = Work()
app = FastAPI()


@app.post("/draw")
async def draw(request: Request) -> Response:
    """Draw a PNG of an order in JSON, or of a picture's bytes with the seed in the query."""
    if request.headers["content-type"] == "image/png":
        order = work.order(dict(request.query_params), await request.body())
    else:
        order = work.order(await request.json())
    return Response(png(work.draw([order])[0]), media_type="image/png")


uvicorn.run(app, host="127.0.0.1", port=PORT, access_log=False, log_level="warning")
