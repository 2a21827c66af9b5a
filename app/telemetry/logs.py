"""How the log is written: one line for people, or one JSON object for machines. Never a prompt, a key or a query."""

import json
import logging
import time
from typing import Any, Literal


class Facts(dict[str, Any]):
    """A line of named facts: for people their values, for machines an object."""

    def __str__(self) -> str:
        return " ".join(str(value or "-") for value in self.values())


class JsonLines(logging.Formatter):
    """One object per line: time, level, logger, and either a message or facts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line |= record.msg if isinstance(record.msg, Facts) else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Sets up the `fewstep` loggers, and uvicorn's where it has any: its access log would be each request twice."""
    logger = logging.getLogger("fewstep")
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    access = logging.getLogger("uvicorn.access")
    access.handlers, access.propagate = [], False
    if form == "json":
        for handler in (*logging.getLogger().handlers, *logging.getLogger("uvicorn").handlers):
            handler.setFormatter(JsonLines())
