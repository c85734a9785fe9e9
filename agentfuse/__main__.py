"""``python -m agentfuse``."""

from agentfuse.cli import main

main()
