"""Sending journals to MLflow in a process of its own."""

from __future__ import annotations

from fanin.outbox import Outbox


def ensure_sender(outbox: Outbox) -> None:
    """Start the sender unless one is at work."""
