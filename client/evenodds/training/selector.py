"""The trainer's side: `PromptSelector` chooses batches and reports outcomes, and never stops a training run.

Whatever the service, the network or the disk do, `select` returns a batch within the deadline: the service's choice,
or else a uniform one. It knows no training framework; those are met in `evenodds.integrations`.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args
from uuid import uuid4

from evenodds.errors import ConfigurationError, InvalidRequest
from evenodds.schemas import PromptIn, SelectRequest
from evenodds.training.batch import Arm, Batch
from evenodds.training.batch_requests import NotAnswered
from evenodds.training.inputs import (
    Outcomes,
    Setup,
    as_index,
    bodies,
    checked_observations,
    checked_prompts,
    checked_selection_id,
    checked_settings,
    checked_state,
    checked_step,
)
from evenodds.training.kept import Group, informative_ids, kept
from evenodds.training.outbox import Delivery
from evenodds.training.running import Running
from evenodds.training.sender import OutboxSender
from evenodds.training.status import Counts
from evenodds.validation import request_of

DEFAULT_OUTBOX = Path(".evenodds")
STATE_FORMAT = 1
Existing: TypeAlias = Literal["refuse", "auto", "resume"]

UNKNOWN_SHARE = 0.5
"""Share of informative groups that a uniform batch is expected to have."""


class PromptSelector:
    """Chooses the prompts of each step by what the service has learned, and tells it what came of them.

    No fault of the service, the network or the disk raises into the training loop or holds it up for longer than the
    deadline. While the service fails, a batch is drawn uniformly, as a function of (seed, step). The log has one
    warning when that begins, and one line when the service answers again. Observations are on disk before they are
    sent, in the background, and each counts once, even if this process or the service dies in between. The next
    selector of the run with the same outbox delivers what is left.

    What raises is a mistake in the program: `ConfigurationError` from the constructor, `load_state_dict`, or a call
    after `close`; `InvalidRequest` from `select`, `prefetch` and `observe`, as their texts say.

    Several processes: give each its `rank`, and a `broadcast` in which all take part. Then rank 0 asks, and all get
    its batch. Without `broadcast` each process asks on its own. The service gives all of them the same batch. If it
    fails for some of them, their batches differ, and a resumed training may lose outcomes. Each process observes its
    own outcomes. Processes of one machine may share the outbox.

    Threads may share a selector. A process that was forked or unpickled from this one starts threads and connections
    of its own at its first call; an unpickled selector has no `broadcast`.

    It has more than eight arguments, because a training script has no other place to set them.

    Args:
        base_url: Where the service is. None is offline: batches are uniform, and observations are kept only where
            `outbox` names a folder, for a later selector to deliver.
        run: Name of the run.
        prompts: The pool, as far as this trainer can attempt it: prompt ids; or mappings with a `prompt_id` and the
            other fields of `PromptIn`, and then the run is created and its pool loaded, in the background.
        run_settings: Arguments of `Client.put_run` for the run; what is left out keeps its value.
        seed: Seed of uniform batches, in [0, 2**63).
        deadline_seconds: How long a call may take, above 0. `wait_until_ready`, `flush` and `close` have their own.
        outbox: Folder for what is not delivered yet; `.evenodds` in the working folder by default.
        prefetch: Ask for the batch of step s + 1 as soon as the observations of step s are delivered, with the
            arguments of the last `select`. For trainers that select and observe once a step and count by one.
        rank: Of this process, at least 0.
        broadcast: Called once by every rank in each `select`, with the batch on rank 0 and None on the others:
            returns that batch on all. See `evenodds.integrations.torch`.
        existing: What to do where this training begins at a step that the run has gone through already: a second
            training under the name, or one that goes on without the state of its checkpoint. `refuse` raises; where
            batches were handed out before the service could be asked, it goes on with uniform ones, and holds the
            outcomes back in the outbox. `auto` forgets what came from that step on, and says what it forgot. `resume`
            goes on with all that the run has: steps that have a batch get it again, their outcomes count once more, and
            what an earlier selector held back is delivered.

    The constructor has more than eight arguments because they are all that a training script sets.

    Raises:
        ConfigurationError: An argument is out of its range, or there are no prompts.
    """

    def __init__(
        self,
        base_url: str | None,
        run: str,
        prompts: Iterable[str | PromptIn | Mapping[str, object]],
        *,
        run_settings: Mapping[str, object] | None = None,
        seed: int = 0,
        deadline_seconds: float = 2.0,
        outbox: str | os.PathLike[str] | None = None,
        prefetch: bool = False,
        rank: int = 0,
        broadcast: Callable[[Batch | None], Batch] | None = None,
        existing: Existing = "refuse",
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ConfigurationError(f"seed {seed!r} must be in [0, 2**63)")
        self._prompt_ids, whole = checked_prompts(prompts)
        self._known = frozenset(self._prompt_ids)
        folder = DEFAULT_OUTBOX if outbox is None and base_url is not None else outbox
        self._setup = Setup(
            base_url,
            run,
            run_settings=checked_settings(run_settings),
            prompts=whole,
            folder=None if folder is None else Path(folder).absolute(),
            deadline_seconds=deadline_seconds,
            prefetches=prefetch,
            releases_held=existing == "resume",
        )
        self._seed = seed
        self._rank = _checked_rank(rank)
        self._broadcast = broadcast
        if existing not in get_args(Existing):
            raise ConfigurationError(f"existing {existing!r} must be one of {', '.join(get_args(Existing))}")
        self._existing: Existing = existing
        self._first_step: int | None = None
        self._begins_anew = rank == 0
        self._parents_head: int | None = None
        self._observed_step: int | None = None
        self._incarnation: str | None = uuid4().hex if rank == 0 else None
        self._is_closed = False
        self._made_in = os.getpid()
        self._running: Running | None = None
        if base_url is not None and rank == 0:
            # Delivers what an earlier process left, and loads the pool. Other ranks begin at their first call: what
            # they have left may have to be forgotten first, and rank 0 does not wait for them.
            self._here()

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._setup.run

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """The pool, in the order given."""
        return self._prompt_ids

    @property
    def observed_step(self) -> int | None:
        """The newest step whose outcomes this process has reported, or to which it went back; None for none."""
        return self._observed_step

    def select(
        self,
        step: SupportsIndex,
        batch_size: SupportsIndex,
        *,
        candidates: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        categories: Mapping[str, float] | None = None,
        groups: Mapping[str, float] | None = None,
    ) -> Batch:
        """Choose the prompts of a step, within the deadline.

        Args:
            step: The policy version that will attempt the batch. The same arguments again give the same batch, as
                long as it is one of the last 8.
            batch_size: Prompts to choose, in [1, 10,000].
            candidates: Choose among these only.
            exclude: Leave these out.
            categories: Least share of the batch by category of the prompts. A uniform batch ignores it.
            groups: Older name of `categories`, until 1.0.

        Raises:
            InvalidRequest: The arguments can never be served.
            ConfigurationError: The selector is closed; or the run has gone through this step already, see `existing`.
        """
        return self._selected(self._request("select", locals()))

    def select_informative(
        self,
        step: SupportsIndex,
        informative_groups: SupportsIndex,
        *,
        candidates: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        categories: Mapping[str, float] | None = None,
        fill_factor: float | None = None,
        max_prompts: SupportsIndex | None = None,
        update_cost: float | None = None,
    ) -> Batch:
        """Choose as many prompts as it takes to find so many informative groups in one wave, within the deadline.

        Roll all of them out, hand all outcomes to `informative`, and train on what it returns. `Batch.fill` says what
        the service expects. A uniform batch has twice as many prompts as groups are wanted.

        Args:
            step: As in `select`; so are `candidates`, `exclude` and `categories`.
            informative_groups: Groups whose attempts are not all rewarded alike, in [1, 10,000].
            fill_factor: Expected informative groups over those asked for, in [0.1, 4]; 1 by default.
            max_prompts: Prompts at most; 6 times `informative_groups` by default.
            update_cost: Of a group, in units of the cost of its rollouts: the service then says whether filling pays.

        Raises:
            InvalidRequest: The arguments can never be served.
            ConfigurationError: As in `select`.
        """
        return self._selected(self._request("select_informative", locals()))

    def informative(self, batch: Batch, outcomes: Outcomes, *, size: int | None = None) -> tuple[str, ...]:
        """Report all outcomes of a batch, and return the prompts of it to train on, in the batch's order.

        These are the informative groups, whose attempts were not all rewarded alike. The others teach the policy
        nothing, but they teach the service what is hard and easy.

        Args:
            batch: Of `select_informative` or `select`. Several processes: what counts is of the prompts whose outcomes
                this one reports.
            outcomes: As in `observe`.
            size: Return exactly this many prompts, if there are enough: of each category its part of the batch, as far
                as it has informative groups. If all categories together have too few, silent groups are added from the
                categories that lack the most. By default all informative groups are returned.

        Raises:
            InvalidRequest: The size is below 1; or as in `observe`.
            ConfigurationError: The selector is closed.
        """
        if size is not None and size < 1:
            raise InvalidRequest("informative", [f"size: {size} must be at least 1"])
        sound = self._report(batch.step, outcomes, batch.selection_id)
        mixed, reported = informative_ids(sound), {each.get("prompt_id") for each in sound}
        named = {} if batch.reply is None else {prompt.prompt_id: prompt.category for prompt in batch.reply.prompts}
        groups = [Group(i, named.get(i), i in mixed) for i in batch.prompt_ids if i in reported]
        return kept(groups, size)

    def prefetch(
        self,
        step: SupportsIndex,
        batch_size: SupportsIndex | None = None,
        *,
        informative_groups: SupportsIndex | None = None,
        candidates: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        categories: Mapping[str, float] | None = None,
        fill_factor: float | None = None,
        max_prompts: SupportsIndex | None = None,
        update_cost: float | None = None,
        groups: Mapping[str, float] | None = None,
    ) -> None:
        """Start to choose the prompts of a step, so that `select` with the same arguments finds them. Returns at once.

        With `informative_groups` in place of `batch_size`, `select_informative` finds them. The arguments are those of
        both methods. The choice does not use outcomes that are observed after this call.

        Raises what `select` raises.
        """
        request = self._request("prefetch", locals())
        requests = self._here().requests
        if requests is not None and (self._rank == 0 or self._broadcast is None):
            try:
                requests.ask(request)
            except (NotAnswered, RuntimeError):
                return  # no thread is available: `select` will say so, if that lasts

    def observe(
        self,
        step: SupportsIndex,
        outcomes: Outcomes,
        *,
        selection_id: str | None = None,
    ) -> None:
        """Report outcomes of attempts. They are delivered in the background, each exactly once.

        When it returns they are on disk. If the disk takes longer than the deadline, they follow later. An outcome
        that is not valid (of a prompt outside the pool without its text) is left out and counted, with one warning.

        Args:
            step: The policy version that made the attempts.
            outcomes: Rewards in [0, 1] by prompt id, or observations as `Client.observe` takes them. A reward of None
                or NaN is not an attempt: use it for attempts that failed for other reasons than the policy.
            selection_id: The selection whose outcomes these are; by default that of this step's batch, if this
                selector got one from the service.

        Raises:
            InvalidRequest: The step is not an integer in [0, 2**53], the rewards of a prompt are not a list, or a
                reward is not a number in [0, 1]. Then nothing of the call is kept.
            ConfigurationError: The selector is closed.
        """
        self._report(checked_step("observe", step), outcomes, selection_id)

    def state_dict(self, *, step: SupportsIndex | None = None) -> dict[str, Any]:
        """What belongs into the trainer's checkpoint: plain JSON, small while the service is up.

        It holds the outcomes that are not delivered yet, so that nothing is lost even if the outbox's disk is lost.

        Args:
            step: The policy version that the checkpoint holds; the newest observed one by default.

        Raises:
            ConfigurationError: The selector is closed.
        """
        return {
            "format": STATE_FORMAT,
            "run": self._setup.run,
            "seed": self._seed,
            "step": self._observed_step if step is None else checked_step("state_dict", step),
            "undelivered": [asdict(delivery) for delivery in self._here().sender.waiting()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint: what was observed after its step is forgotten, here and by the service.

        A state that was saved before anything was observed has no step: nothing is forgotten, and `existing` says
        what to do where the run has gone through the first step already.

        The service is told in the background, before anything else is; until it has confirmed, batches are uniform.
        Every rank calls this before it selects or observes; rank 0 tells the service. What any rank reports after its
        next `select` is kept, also where it arrives before the service was told.

        Raises:
            ConfigurationError: The state is not of this run, or the selector is closed.
        """
        step, undelivered = checked_state(state, self._setup.run, STATE_FORMAT)
        here = self._here()
        self._seed = state["seed"]
        self._observed_step = step
        if step is not None:
            self._go_back(step, undelivered)
            return
        here.forget()  # the seed may be another one
        if self._rank == 0 and self._keeps:
            here.sender.put(undelivered)

    def rewind_to(self, step: SupportsIndex) -> None:
        """Go back to a checkpoint that holds no state: what was observed after this step is forgotten.

        Otherwise like `load_state_dict`. Step -1 forgets every step.

        Raises:
            InvalidRequest: The step is not an integer in [-1, 2**53].
            ConfigurationError: The selector is closed.
        """
        at = -1 if as_index(step) == -1 else checked_step("rewind_to", step)
        self._observed_step = at if at >= 0 else None
        self._go_back(at, [])

    def _go_back(self, step: int, undelivered: list[Delivery]) -> None:
        here = self._here()
        self._begins_anew = False
        self._incarnation = uuid4().hex if self._rank == 0 else None
        if self._rank > 0 and self._broadcast is None:
            here.status.say_once(
                "no broadcast",
                f"rank {self._rank} has no broadcast. So outcomes that it reports before rank 0 has gone back are "
                "lost, and "
                "batches may differ between ranks: give all ranks evenodds.integrations.torch.ranks()",
            )
        here.forget()
        if self._keeps:
            rewind = [*undelivered, Delivery("rewind", step, self._request_id())] if self._rank == 0 else []
            here.sender.forget_after(step, rewind)

    def use_ranks(self, rank: int, broadcast: Callable[[Batch | None], Batch]) -> None:
        """Be one of several ranks from now on: for adapters that learn of the other ranks only later.

        Raises:
            ConfigurationError: The rank is below 0.
        """
        self._rank = _checked_rank(rank)
        self._broadcast = broadcast

    def set_group_size(self, attempts: int) -> None:
        """Tell the run how many attempts each prompt gets: for adapters that learn it from their framework.

        Another `group_size` of `run_settings` gives way, with a warning.

        Raises:
            ConfigurationError: It is not in [1, 1024], or the selector is closed.
        """
        settings = checked_settings({"group_size": attempts})
        here = self._here()
        given = (self._setup.run_settings or {}).get("group_size")
        if given == attempts:
            return
        if given is not None:
            here.status.say_once(
                "group size given",
                f"group_size is {attempts}, as many attempts as the trainer makes, and not {given} as run_settings say",
            )
        self._setup = replace(self._setup, run_settings={**(self._setup.run_settings or {}), **(settings or {})})
        if self._rank == 0:
            here.sender.change(self._setup)

    @property
    def has_broadcast(self) -> bool:
        """Whether rank 0 chooses for all ranks."""
        return self._broadcast is not None

    def counts(self) -> Counts:
        """What this selector has done so far in this process."""
        return self._here().status.counts

    def metrics(self, prefix: str = "evenodds/") -> dict[str, float]:
        """Figures of this process for the trainer's own tracker (W&B, TensorBoard, MLflow); {} before the first step.

        `informative_share`: of the newest observed step, the share of groups whose rewards differ. `forecast_share` and
        `forecast_error`: what the service foretold of it, and by how much it is more. `coverage`: the share of the
        prompts that were chosen so far. `from_service`: 1 if the service chose the newest batch, 0 if it is uniform.
        `select_seconds`: how long the trainer waited for it. `uniform_batches`, `undelivered`: as `counts` has them.

        Args:
            prefix: Of the names.
        """
        here = self._here()
        counts = here.status.counts
        figures = here.metrics.figures()
        if figures:
            figures["uniform_batches"] = float(counts.uniform_batches)
            figures["undelivered"] = float(max(0, counts.observed - counts.delivered - counts.refused))
        return {prefix + name: value for name, value in figures.items()}

    def refusals(self) -> tuple[tuple[Delivery, str], ...]:
        """The deliveries that the service refused for what they hold, and those that are held back; and why."""
        return self._here().sender.refusals()

    def wait_until_ready(self, timeout_seconds: float = 60.0) -> bool:
        """Wait for the run to be created and its pool loaded, where that is this selector's work. Whether it is there.

        True says that the service has all prompts of this selector. Without it, the first batches are uniform until
        the pool is loaded.
        """
        here = self._here()
        return here.requests is not None and here.sender.wait_until_ready(timeout_seconds)

    def flush(self, timeout_seconds: float = 30.0) -> bool:
        """Wait until the service has answered for everything that was observed. Whether it has.

        It has not where outcomes are held back; `refusals` gives them.
        """
        return self._here().sender.flush(timeout_seconds)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Deliver what is left and end the threads, for at most so long. The rest stays on disk. Repeating is safe.

        The selector does this at the end of the program too.
        """
        if not self._is_closed and self._running is not None and self._running.pid == os.getpid():
            atexit.unregister(self.close)
            self._running.close(timeout_seconds)
        self._running = None
        self._is_closed = True

    def __enter__(self) -> PromptSelector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        head = self._parents_head if self._running is None else self._head(self._running.sender)
        return {**self.__dict__, "_running": None, "_broadcast": None, "_parents_head": head}

    @property
    def _keeps(self) -> bool:
        """Whether observations are kept: somebody will deliver them."""
        return self._setup.folder is not None

    def _here(self) -> Running:
        """The threads of this process, started if need be."""
        if self._is_closed:
            raise ConfigurationError(f"the selector of run {self._setup.run!r} is closed: make a new one")
        if self._running is None or self._running.pid != os.getpid():
            if self._running is not None:
                _INHERITED.append(self._running)
                self._parents_head = self._head(self._running.sender)
            self._running = Running(
                self._setup,
                prompt_ids=self._prompt_ids,
                loads_pool=self._rank == 0 and os.getpid() == self._made_in,
                prepared=self._prepared,
                before_sending=self._hold_if_refused,
            )
            atexit.register(self.close)
        return self._running

    def _selected(self, request: SelectRequest) -> Batch:
        here = self._here()
        if here.pid != self._made_in:
            self._check_in_child()
        began = time.monotonic()
        if self._broadcast is None or here.pid != self._made_in:  # a data loader's worker has no part in it
            batch = self._choose(request, here)
        else:
            own = replace(self._choose(request, here), held=self._held(here)) if self._rank == 0 else None
            batch = self._broadcast(own)
            self._incarnation = batch.incarnation
            if batch.incarnation is not None and batch.held is not None:
                here.sender.hold(batch.incarnation, batch.held)
        here.remember(batch)
        here.metrics.chosen(batch, time.monotonic() - began)
        return batch

    def _choose(self, request: SelectRequest, here: Running) -> Batch:
        key = request.model_dump_json()
        batch = here.batches.get(key)
        if batch is None:
            batch = self._asked(request, here) or self._uniform(request)
            here.status.count(**{f"{batch.source}_batches": 1})
            here.keep(key, batch)
        return batch

    def _asked(self, request: SelectRequest, here: Running) -> Batch | None:
        """The service's choice; None, and the log says why, if it does not come in time."""
        if here.requests is None or self._held(here) is not None:
            return None
        here.last_request = request
        try:
            reply = here.requests.ask(request).result(self._setup.deadline_seconds)
            ids = tuple(prompt.prompt_id for prompt in reply.prompts)
            arms: list[Arm] = [prompt.arm for prompt in reply.prompts]
            unknown = [prompt_id for prompt_id in ids if prompt_id not in self._known]
            if unknown:
                here.sender.look_again()
                raise NotAnswered(
                    f"it chose {len(unknown)} prompts that this trainer lacks: {unknown[0]!r} ..., which are left out "
                    "from now on"
                )
        except ConfigurationError:
            raise
        except FutureTimeout:
            here.status.failed(
                "choosing", f"no batch for step {request.step} within {self._setup.deadline_seconds:g} s"
            )
            return None
        except Exception as error:  # whatever it is, it must not stop the training
            if self._held(here) is None:  # else the log has said so
                here.status.failed("choosing", error)
            return None
        here.status.succeeded("choosing")
        return Batch(request.step, ids, tuple(arms), reply, self._incarnation)

    def _prepared(self, request: SelectRequest) -> SelectRequest:
        """The request as it is sent, of what the trainer can attempt. In a thread of its own.

        Raises:
            ConfigurationError: The run has gone through the first step already, and no batch was handed out yet.
            NotAnswered: The outcomes of this training are held back.
        """
        here = self._here()
        pool, counts = here.sender.pool, here.status.counts
        if pool is None:
            return request
        head, first = self._gone_through(here.sender), self._first_step or 0
        if head is not None and self._existing == "refuse" and counts.service_batches + counts.uniform_batches == 0:
            raise ConfigurationError(
                f"run {self._setup.run!r} {self._past(head)}. To go on from a checkpoint, load the selector's state. "
                f"Otherwise set existing: 'auto' forgets everything from step {first} on, 'resume' continues with all "
                "that the run has. Another run name begins with nothing"
            )
        self._hold_if_refused(here.sender, self._incarnation)
        held = self._held(here)
        if held is not None:
            raise NotAnswered(held)
        if head is not None:
            self._begins_anew = False
            here.status.say_once(
                "existing",
                f"it {self._past(head)}: what came from step {first} on is forgotten (existing='auto')",
            )
            here.sender.put([Delivery("rewind", first - 1, self._request_id())])
        return pool.narrowed(request)

    def _gone_through(self, sender: OutboxSender) -> int | None:
        """The run's newest step, where this training begins at one that the run has gone through; None otherwise."""
        pool, first = sender.pool, self._first_step
        if not self._begins_anew or os.getpid() != self._made_in or self._rank > 0 or pool is None or first is None:
            return None
        head = self._head(sender)
        if head is not None and first <= head and self._existing != "resume":
            return head
        self._begins_anew = False
        return None

    @staticmethod
    def _head(sender: OutboxSender) -> int | None:
        """The newest step of the run before this training, as far as is known yet."""
        steps = (None if sender.pool is None else sender.pool.head_step, sender.left_step)
        return max((step for step in steps if step is not None), default=None)

    def _check_in_child(self) -> None:
        """By what the parent knew when it made this process: what the run has now may be of this very training.

        Raises:
            ConfigurationError: The run has gone through the first step already.
        """
        head, first = self._parents_head, self._first_step
        if head is None or first is None or first > head:
            return
        if self._begins_anew and self._existing != "resume":
            raise ConfigurationError(
                f"run {self._setup.run!r} {self._past(head)} in another process, which cannot make the run forget "
                f"(existing={self._existing!r}). Before that process is made, load the selector's state, or call "
                f"rewind_to({first - 1}) to forget everything from step {first} on. existing='resume' continues with "
                "all that the run has, and another run name begins with nothing"
            )

    def _past(self, head: int) -> str:
        return f"has gone through steps up to {head} already, and this training begins at step {self._first_step}"

    def _held(self, here: Running) -> str | None:
        """Why the outcomes of this training are held back; None where they are delivered."""
        return None if self._incarnation is None else here.sender.held.get(self._incarnation)

    def _hold_if_refused(self, sender: OutboxSender, incarnation: str | None) -> None:
        """A training that began without the service learns only now that it is a second one: it must not be stopped."""
        if incarnation is None or incarnation != self._incarnation or self._existing != "refuse":
            return
        head = self._gone_through(sender)
        if head is not None:
            sender.hold(
                incarnation,
                f"it {self._past(head)}, which the service could not say before the first batch was handed out "
                "(existing='refuse'): another run name begins with nothing",
            )

    def _uniform(self, request: SelectRequest) -> Batch:
        eligible, n = self._eligible(request), request.batch_size
        if n is None:
            wanted = (request.informative_groups or 1) * (request.fill_factor or 1.0)
            n = min(math.ceil(wanted / UNKNOWN_SHARE), request.most_prompts, len(eligible))
        chosen = Random(f"{self._seed} {request.step}").sample(eligible, n)
        arms: list[Arm] = ["uniform"] * len(chosen)
        return Batch(request.step, tuple(chosen), tuple(arms), incarnation=self._incarnation)

    def _request_id(self) -> str:
        return uuid4().hex if self._incarnation is None else f"{self._incarnation}.{uuid4().hex}"

    def _report(self, at: int, outcomes: Outcomes, selection_id: str | None) -> list[dict[str, Any]]:
        """Put them on their way. Returns those that are observations."""
        here = self._here()
        checked = checked_observations(outcomes, self._known)
        sound, faults = checked.sound, checked.faults
        here.status.count(observed=len(sound), left_out=len(faults), without_reward=checked.n_without_reward)
        if faults:
            here.status.say_once(
                "left out",
                f"{len(faults)} of {len(sound) + len(faults)} outcomes of step {at} are not valid and were left "
                f"out, and later ones may be too (this is said once): {faults[0]}",
            )
        if not sound:
            return sound
        here.metrics.observed(at, sound)
        here.watch.not_chosen(at, sound, here.chosen.get(at))
        pool = here.sender.pool
        if self._broadcast is None:  # else each rank reports its part of a group
            here.watch.attempts(at, sound, None if pool is None else pool.group_size)
        self._observed_step = max(at, self._observed_step or 0)
        if self._keeps:
            chosen = here.selections.get(at) if selection_id is None else checked_selection_id(selection_id)
            if selection_id is not None and chosen is None:
                here.status.say_once(
                    "selection", f"selection_id {selection_id!r:.80} is not an id: outcomes are reported without it"
                )
            here.sender.put([Delivery("observe", at, self._request_id(), chosen, body) for body in bodies(sound)])
        return sound

    def _request(self, call: str, given: Mapping[str, Any]) -> SelectRequest:
        names = ("step", "batch_size", "informative_groups", "max_prompts")
        numbers = {name: as_index(given[name]) for name in names if given.get(name) is not None}
        fields = {**given, **numbers, "run": self._setup.run, "seed": self._seed}
        request = request_of(call, SelectRequest, fields, stacklevel=3)
        for name, ids in (("candidates", request.candidates), ("exclude", request.exclude)):
            unknown = [prompt_id for prompt_id in ids or () if prompt_id not in self._known]
            if unknown:
                more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
                message = f"{name}: not among this selector's prompts: {unknown[0]!r}{more}; leave them out"
                raise InvalidRequest(call, [message])
        n_eligible, least = len(self._eligible(request)), request.least_prompts
        if n_eligible < least:
            what = "informative_groups" if request.batch_size is None else "batch_size"
            raise InvalidRequest(call, [f"{what}: {least} prompts asked for, {n_eligible} to choose from"])
        if self._first_step is None:
            self._first_step = request.step
        return request

    def _eligible(self, request: SelectRequest) -> Sequence[str]:
        if request.candidates is None and not request.exclude:
            return self._prompt_ids
        left_out = frozenset(request.exclude or ())
        among = self._prompt_ids if request.candidates is None else dict.fromkeys(request.candidates)
        return [prompt_id for prompt_id in among if prompt_id not in left_out]


def _checked_rank(rank: int) -> int:
    if rank < 0:
        raise ConfigurationError(f"rank {rank!r} must be at least 0")
    return rank


_INHERITED: list[Running] = []
"""What belongs to the process that this one was forked from: closing its files here would disturb that one."""
