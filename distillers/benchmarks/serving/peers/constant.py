"""Serve by our own server, with a constant picture in place of the forward pass."""

import numpy as np
import uvicorn
from work import OPTIONS, PORT, constant

from app.engine.model import Model
from app.main import create_app

picture = constant(*OPTIONS["size"])


def draw(self, steps, orders, *_, **__):
    """Return the constant picture for each order."""
    return np.broadcast_to(picture, (len(orders), *picture.shape))


assert hasattr(Model, "draw")  # what is replaced must be what is called
Model.draw = draw
uvicorn.run(create_app(), host="127.0.0.1", port=PORT, access_log=False, log_level="warning")
