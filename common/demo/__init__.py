"""The demo: a small real model, text and tasks that need no hub access."""
