"""Whose a new file is: what the configuration says of the process that makes it."""

from __future__ import annotations

from agentfuse.regions import Creator

__all__ = ["Creator"]
