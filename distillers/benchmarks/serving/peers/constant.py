"""Our own server with a constant picture where the forward pass would be."""

import numpy as np
import uvicorn
from work import PORT, TOLD, constant

from app.engine.model import Model
from app.main import create_app

picture = constant(*TOLD["size"])


def draw(self, steps, orders, *_, **__):
    """The constant, so many times."""
    return np.broadcast_to(picture, (len(orders), *picture.shape))


assert hasattr(Model, "draw")  # what is replaced must be what is called
Model.draw = draw
uvicorn.run(create_app(), host="127.0.0.1", port=PORT, access_log=False, log_level="warning")
