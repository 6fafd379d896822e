"""What can go wrong in the model room. Each error carries a stable `code`; only `api` knows statuses."""

from __future__ import annotations
