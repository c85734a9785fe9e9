"""agentfuse mounts an AI agent's home as a real filesystem and keeps its memory."""

__version__ = "0.1.0"
