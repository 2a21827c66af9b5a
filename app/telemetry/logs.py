"""Format log lines as text for people or as JSON objects for machines. Prompts, keys and queries are never logged."""

import json
import logging
import time
from typing import Any, Literal


class Facts(dict[str, Any]):
    """Holds the named facts of a log line, written as their values in text and as an object in JSON."""

    def __str__(self) -> str:
        return " ".join(str(value or "-") for value in self.values())


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, and either a message or facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of JSON."""
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
    """Set up the `fewstep` loggers and uvicorn's format. Uvicorn's access log is silenced: ours has every request."""
    logger = logging.getLogger("fewstep")
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    access = logging.getLogger("uvicorn.access")
    access.handlers, access.propagate = [], False
    if form == "json":
        for handler in (*logging.getLogger().handlers, *logging.getLogger("uvicorn").handlers):
            handler.setFormatter(JsonLines())
