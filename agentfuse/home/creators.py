"""Who made a file."""

from __future__ import annotations

import enum


class Creator(enum.StrEnum):
    """Who made a file; the words are the HTTP contract's ``createdBy``."""

    USER = "user"
    """A person, through an API or staging."""
    AGENT = "agent"
    """The agent, through its tools."""
    ENVIRONMENT = "environment"
    """A browser, or what came from outside in another way."""
    SYSTEM = "system"
    """The platform."""
