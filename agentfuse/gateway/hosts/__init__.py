"""Many hosts: who this one is, which others live, and requests that belong to another. See docs/hosts.md."""
