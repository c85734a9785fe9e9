"""How the daemon writes into its own mount: through processes that may wait for it and die with it."""
