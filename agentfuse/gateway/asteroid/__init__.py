"""The Asteroid API, version 2, to the letter of its contract: routes, what they read and what they answer."""
