"""The price of an attempt under a budget policy, kept in step with the requests that come in.

Deterministic in the requests and their order; knows no clock, no run and no HTTP.
"""

from __future__ import annotations

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.budgets.allocation import fit_price
from evenodds_service.domain.settings import BudgetPolicy

MOST_REQUESTS, LEAST_REQUESTS = 512, 64
_CELLS = 32_768  # requests times attempts that a fit looks through
_FIT_EVERY = 64
_KEEP = 0.5
_DAMPING = 0.5


class Traffic:
    """What was asked last under one policy, and the price at which it would have met the policy's target.

    The price rests on the beliefs about the newest requests. Where attempts are asked for one after another, what was
    really granted is seen too: beliefs that promise successes which do not come make requests go on for longer than
    the price allows for, so that as soon as more than the target is granted, the price is fitted to a lower one. It is
    never fitted to a higher one: who asks once and makes all its attempts seems to spend little.

    Args:
        a, b: Beliefs about requests to begin with, possibly none.
    """

    def __init__(self, policy: BudgetPolicy, a: FloatArray, b: FloatArray) -> None:
        self._policy = policy
        self._size = int(np.clip(_CELLS // policy.max_attempts, LEAST_REQUESTS, MOST_REQUESTS))
        self._a, self._b = a[-self._size :], b[-self._size :]
        self._price = 0.0
        self._since_fit = self._size  # the first price is due at once
        self._target = policy.target_attempts
        self._requests = self._granted = 0.0

    def price(self, a: FloatArray, b: FloatArray) -> float:
        """The price for these new requests, which count as traffic from here on."""
        if len(a):
            self._a = np.concatenate([self._a, a])[-self._size :]
            self._b = np.concatenate([self._b, b])[-self._size :]
            self._since_fit += len(a)
            self._requests += len(a)
        if len(self._a) and self._since_fit >= min(_FIT_EVERY, max(1, len(self._a) // 4)):
            self._fit()
        return self._price

    def grant(self, n: int) -> None:
        """So many single attempts were granted."""
        self._granted += n

    def _fit(self) -> None:
        policy = self._policy
        if policy.mode == "sequential" and self._requests >= _FIT_EVERY:
            too_much = self._granted / self._requests / policy.target_attempts
            if self._granted:
                self._target /= too_much**_DAMPING
            self._target = float(np.clip(self._target, policy.min_attempts, policy.target_attempts))
            self._requests *= _KEEP
            self._granted *= _KEEP
        self._price, _ = fit_price(
            policy.mode, self._a, self._b, self._target, minimum=policy.min_attempts, maximum=policy.max_attempts
        )
        self._since_fit = 0
