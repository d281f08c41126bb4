"""What all parts of a typed report share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, StrictFloat, StrictInt

#: A number as it stands in JSON: an integer stays one.
Number = StrictInt | StrictFloat


class Block(BaseModel):
    """A part of a report: read-only; keys that it does not list are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
