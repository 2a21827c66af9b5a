"""Options from TOML are checked against a dataclass and converted to its types."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_type_hints

from distillers.errors import BadInput


def checked(kind: type, options: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert options from TOML's types to the dataclass's. Raises BadInput naming an unknown or wrongly typed key."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints, known = get_type_hints(kind), {f.name for f in fields(kind)}
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise BadInput(f"{where}.{key}", value, ", ".join(sorted(known)))
        try:
            # JSON's strict rules: a list is a tuple and 1 a float, but "1" and true are no numbers, nor are nan and inf
            adapter = TypeAdapter(hints[key], config=ConfigDict(strict=True, allow_inf_nan=False))
            checked[key] = adapter.validate_json(json.dumps(value, default=str))
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(".".join(map(str, (where, key, *first["loc"]))), value, first["msg"]) from None
    return checked
