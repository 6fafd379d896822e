"""The calls of the wire contract, each written once: its arguments, its request and its reply.

Every call here may be repeated safely, so every call is retried. Does no I/O: see `protocol.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from pydantic import TypeAdapter

from evenodds.errors import InvalidRequest
from evenodds.protocol import Exchange, Protocol
from evenodds.schemas import (
    MAX_ITEMS,
    Acquisition,
    AllocatePrompt,
    AllocateReply,
    AllocateRequest,
    AllocationMethod,
    BeliefReport,
    BudgetMode,
    BudgetReply,
    BudgetRequest,
    Health,
    Objective,
    Observation,
    ObserveReply,
    ObserveRequest,
    PolicyList,
    PolicyName,
    PolicyState,
    PolicyUpdate,
    Predictor,
    PredictReply,
    PredictRequest,
    PromptId,
    PromptIn,
    PromptPage,
    PromptRef,
    PromptsAdded,
    PromptState,
    RefitList,
    RefitPolicy,
    RefitRequest,
    RefitState,
    Request,
    Retention,
    RetractRequest,
    RewindRequest,
    RunName,
    RunPage,
    RunReport,
    RunSort,
    RunState,
    RunUpdate,
    SelectReply,
    SelectRequest,
    Step,
    Tier,
    Verdict,
    VerdictRequest,
    Voided,
)
from evenodds.validation import RequestT, kept_to, request_of

MAX_CALL_BYTES = 8_000_000
"""Most bytes of prompts in one call of `add_prompts`."""

_PLAIN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""An id that every proxy leaves as it is in a path."""

_RUN: TypeAdapter[str] = TypeAdapter(RunName)
_PROMPT_ID: TypeAdapter[str] = TypeAdapter(PromptId)
_STEP: TypeAdapter[int] = TypeAdapter(Step)
_POLICY_NAME: TypeAdapter[str] = TypeAdapter(PolicyName)


class Calls(Protocol):
    """One method per call. The methods of `Client` and `AsyncClient` are these, driven by their I/O.

    Each raises `InvalidRequest` before anything is sent if its arguments do not keep to the contract, and
    `TransportError`, `ProblemError` or `ReplyInvalid` afterwards.
    """

    def put_run(
        self,
        run: str,
        *,
        predictor: Predictor | None = None,
        group_size: int | None = None,
        target_rate: float | None = None,
        embedder: str | None = None,
        embedder_prompt: str | None = None,
        acquisition: Acquisition | None = None,
        optimism: float | None = None,
        diversity: float | None = None,
        cooldown_steps: int | None = None,
        lease_steps: int | None = None,
        max_visits: int | None = None,
        keep_text: bool | None = None,
        model_size: str | None = None,
        refit: RefitPolicy | Mapping[str, object] | None = None,
        control_share: float | None = None,
        reprobe_share: float | None = None,
        categories: Mapping[str, float] | None = None,
        categories_at_most: Mapping[str, float] | None = None,
        fallback: bool | None = None,
        learn_from: Sequence[str] | None = None,
        data_set: str | None = None,
        retention: Retention | Mapping[str, object] | None = None,
        fork_of: str | None = None,
        at_step: int | None = None,
        groups: Mapping[str, float] | None = None,
        groups_at_most: Mapping[str, float] | None = None,
    ) -> Exchange[RunState]:
        """Create a run, or change settings of an existing one. What is left out keeps its value.

        This method is long because a run has so many settings.

        Args:
            run: Name of the run: letters, digits, `.`, `_`, `-`; at most 128 characters.
            predictor: `gps`, shared model and own evidence; `gps-paper`, the published model alone; `mopps`, own
                evidence alone; `uniform`, chance.
            group_size: Attempts per prompt in training, in [1, 1024].
            target_rate: Success rate to aim at, in (0, 1), instead of the likeliest to be informative.
            embedder: `builtin`, `caller`, `none`, or a sentence-transformers model that the service's operator allows.
            embedder_prompt: Instruction that the embedder puts before each text.
            acquisition: `yield`, `paper`, `thompson` or `uniform`.
            optimism: Weight of the uncertainty in the yield score, in [0, 10].
            diversity: How far below the best score a prompt counts as equally good, in [0, 1]; of these the most
                unlike are chosen.
            cooldown_steps: Steps that a chosen prompt rests; by default 25, at most .4 of an epoch, while there are
                enough others.
            lease_steps: Number of steps for which a chosen prompt is not chosen again while its outcome has not come; 8
                by default, 0 for none.
            max_visits: Most times that a prompt is chosen while there are enough others; 0 sets no limit.
            keep_text: Whether the pool keeps the texts; without them only hashes and vectors are stored.
            model_size: Of the networks of `gps-paper`: `small` or `published`.
            refit: When a worker fits the shared model anew: `every_observations`, `every_seconds`, or both.
            control_share: Share of each batch drawn uniformly, in [0, 0.5], from which `report` estimates the lift.
            reprobe_share: Least share of each batch for the prompts least recently seen, in [0, 1].
            categories: Least share of each batch by category of the prompts; the shares sum to at most 1.
            categories_at_most: Largest share of each batch by category.
            fallback: Choose uniformly while the model's skill against flat MoPPS stays negative.
            learn_from: Names of other runs, and patterns of names such as `math-*`, whose outcomes are used from the
                first batch on; only runs that the key may touch count, and `[]` ends it.
            data_set: Names where the prompts come from: runs of one data set have the same prompts under the same ids.
            retention: What the pool keeps: `prompts`, `days` after the last outcome, or both. Everything by default,
                and 200,000 prompts once a run that chose no batch has answered a budget.
            fork_of: Of a new run: the run whose pool, settings and memory it starts with.
            at_step: With `fork_of`: what came after this step is left out; nothing by default.
            groups, groups_at_most: Older names of `categories` and `categories_at_most`, until 1.0.

        Returns:
            The run as it stands afterwards.

        Raises:
            NotFound: There is no run `fork_of`, or none that `learn_from` names without a pattern.
            Forbidden: `learn_from` names a run that the key may not touch.
            Conflict: There is a run of this name that is not that fork.
            Conflict: The run holds prompts already, and the change would not fit them; or a category's least share
                is above its largest.
        """
        update = _request("put_run", RunUpdate, locals())
        path = _run_path("put_run", run)
        return (yield from self.call("PUT", path, RunState, content=_json(update)))

    def run(self, run: str) -> Exchange[RunState]:
        """The run as it stands, with its alarms.

        Raises:
            NotFound: There is no such run.
        """
        return (yield from self.call("GET", _run_path("run", run), RunState))

    def runs_page(
        self,
        *,
        state: Sequence[Verdict] = (),
        alarm: str | None = None,
        sort: RunSort = "name",
        search: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Exchange[RunPage]:
        """One page of runs: the first, or the one that `next_cursor` of the page before names.

        Args:
            state: Only runs with one of these verdicts; all runs by default.
            alarm: Only runs with this alarm on, by its code, or with `any` alarm.
            sort: `name`; `alarms`, broken runs and those with most alarms first; `activity` and `created`, the newest
                first; `lift` and `informative`, the largest first.
            search: Only runs with this part in their name, of at most 128 characters.
            limit: Most runs of a page, from 1 to 1,000; the service takes 100 by default.
            cursor: `next_cursor` of the page before, with the same other arguments.

        Raises:
            Invalid: An argument is out of its range, or the cursor belongs to another listing.
        """
        given = {"alarm": alarm, "sort": None if sort == "name" else sort, "search": search, "limit": limit}
        query: dict[str, str | list[str]] = {name: str(value) for name, value in given.items() if value is not None}
        query |= {"state": list(state)} if state else {}
        query |= _cursor(cursor)
        return (yield from self.call("GET", "/runs", RunPage, query=query))

    def delete_run(self, run: str) -> Exchange[None]:
        """Delete a run with all it holds. After a lost reply, a repeat that finds no run counts as done.

        Raises:
            NotFound: There is no such run.
        """
        return (yield from self.delete(_run_path("delete_run", run)))

    def refit(self, run: str, *, wait_seconds: float = 0.0) -> Exchange[RefitState]:
        """Ask for a fit of the shared model. A run has at most one that is open: if there is one, that is it.

        A worker (`evenodds work`) does it. A repeat after a lost reply asks for one more fit at most.

        Args:
            wait_seconds: Wait so long for it to end, in [0, 300]. The reply may take that much longer than
                `timeout_seconds`.

        Returns:
            The refit, ended (`done` or `failed`) or as it stands when the time is up.

        Raises:
            NotFound: There is no such run, or it was deleted meanwhile.
        """
        path = f"{_run_path('refit', run)}/refit"
        request = _request("refit", RefitRequest, locals())
        return (yield from self.call("POST", path, RefitState, content=_json(request), silence_seconds=wait_seconds))

    def refits(self, run: str) -> Exchange[RefitList]:
        """The newest refits of a run, at most 100, and what came of them.

        Raises:
            NotFound: There is no such run.
        """
        return (yield from self.call("GET", f"{_run_path('refits', run)}/refits", RefitList))

    def report(self, run: str, *, since_step: int | None = None) -> Exchange[RunReport]:
        """How good the run's forecasts are, and what choosing brought: calibration, ranks, arms, lift, coverage.

        Args:
            since_step: Leave out what ended before this step, in windows; coverage and categories are of the whole run.

        Raises:
            NotFound: There is no such run.
        """
        path = f"{_run_path('report', run)}/report"
        with kept_to("report", "since_step"):
            since = None if since_step is None else _STEP.validate_python(since_step)
        query = {} if since is None else {"since_step": str(since)}
        return (yield from self.call("GET", path, RunReport, query=query))

    def beliefs(self, run: str, *, shown: int = 8) -> Exchange[BeliefReport]:
        """How the beliefs about the whole pool are spread, and its hardest and easiest prompts.

        Args:
            shown: How many of each, in [0, 100].

        Raises:
            NotFound: There is no such run.
        """
        query = {"shown": str(shown)}
        return (yield from self.call("GET", f"{_run_path('beliefs', run)}/beliefs", BeliefReport, query=query))

    def rewind(self, run: str, step: int, *, incarnation: str | None = None) -> Exchange[Voided]:
        """Forget everything observed or selected with a step above `step`: the trainer restarted from its checkpoint.

        Afterwards the run stands as if none of it had happened: a step above may be selected and reported anew, under
        the same request ids too. Call it before the restarted trainer's first other call. Repeating it is safe: what
        is forgotten already is not counted again.

        Args:
            step: The step of the checkpoint; -1 forgets every step.
            incarnation: Name of the restarted trainer, at most 64 letters, digits, `_` and `-`. Observations whose
                request id begins with it and a dot are kept: they are the restarted trainer's own, which another of
                its processes reported before this call.

        Raises:
            NotFound: There is no such run.
        """
        path = f"{_run_path('rewind', run)}/rewind"
        request = _request("rewind", RewindRequest, locals())
        return (yield from self.call("POST", path, Voided, content=_json(request)))

    def retract(
        self,
        run: str,
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        prompt_ids: Sequence[str] | None = None,
        request_id: str | None = None,
    ) -> Exchange[Voided]:
        """Drop observations, for example because a verifier was down. Give at least one condition; all must hold.

        Afterwards the run stands as if they had never been reported. Selections stay. Repeating it is safe.

        Args:
            from_step: The first step whose observations are dropped.
            to_step: The last one.
            prompt_ids: Prompts whose observations are dropped, 1 to 10,000.
            request_id: The `observe` call whose observations are dropped. Dropped as a whole, it may be sent anew
                under the same id.

        Raises:
            NotFound: There is no such run, or no prompt of that id in its pool.
        """
        path = f"{_run_path('retract', run)}/retract"
        request = _request("retract", RetractRequest, locals())
        return (yield from self.call("POST", path, Voided, content=_json(request)))

    def add_prompts(
        self, run: str, prompts: Iterable[PromptIn | Mapping[str, object]], *, keep_existing: bool = False
    ) -> Exchange[PromptsAdded]:
        """Add prompts to the pool, in as many requests as needed. Repeating it is safe.

        All prompts are checked and encoded in memory before the first request. If one has a fault, none is sent.
        Each request is all or nothing. If a later request fails, the prompts of earlier requests are in the pool.

        Args:
            prompts: Any number, at least 1: `PromptIn`, or mappings with its fields.
            keep_existing: A prompt that the pool has with other content stays as it is, and is named in `conflicts`
                with what differs. The other prompts are added.

        Returns:
            `added`, `existing` and `conflicts` summed over the requests; `pool_size` and `log_position` after the last.

        Raises:
            NotFound: There is no such run.
            Conflict: A prompt id is in the pool with another text.
        """
        path = f"{_run_path('add_prompts', run)}/prompts"
        query = {"keep_existing": "true"} if keep_existing else None
        total: PromptsAdded | None = None
        for content in _prompt_batches(prompts):
            reply = yield from self.call("POST", path, PromptsAdded, query=query, content=content)
            if total is not None:
                sums = {
                    "added": total.added + reply.added,
                    "existing": total.existing + reply.existing,
                    "conflicts": total.conflicts | reply.conflicts,
                }
                reply = reply.model_copy(update=sums)
            total = reply
        if total is None:
            raise InvalidRequest("add_prompts", ["prompts: at least 1 prompt is needed, got none"])
        return total

    def add_prompt_lines(self, run: str, lines: bytes, *, first_line: int = 1) -> Exchange[PromptsAdded]:
        """Add prompts that are encoded already, in one request. Repeating it is safe.

        The service stores them in blocks of 2,000 lines, each whole or not at all. Nothing is checked here.

        Args:
            lines: NDJSON: a prompt as JSON on each line; empty lines are skipped.
            first_line: The number by which the service's errors call the first line, at least 1.

        Raises:
            NotFound: There is no such run.
            Conflict: A prompt id is in the pool with another text. The detail names the line.
            Invalid: A line is not a prompt. The detail names it.
        """
        return (
            yield from self.call(
                "POST",
                f"{_run_path('add_prompt_lines', run)}/prompts",
                PromptsAdded,
                query={"first_line": str(first_line)},
                content=lines,
                media_type="application/x-ndjson",
            )
        )

    def prompts_page(self, run: str, *, cursor: str | None = None) -> Exchange[PromptPage]:
        """One page of the pool: the first, or the one that `next_cursor` of the page before names.

        Raises:
            NotFound: There is no such run.
        """
        path = f"{_run_path('prompts_page', run)}/prompts"
        return (yield from self.call("GET", path, PromptPage, query=_cursor(cursor)))

    def prompt(self, run: str, prompt_id: str) -> Exchange[PromptState]:
        """A prompt with the present belief about it and its own history.

        Raises:
            NotFound: There is no such run or prompt.
        """
        path = _run_path("prompt", run)
        with kept_to("prompt", "prompt_id"):
            _PROMPT_ID.validate_python(prompt_id)
        if _PLAIN_ID.fullmatch(prompt_id):
            return (yield from self.call("GET", f"{path}/prompts/{prompt_id}", PromptState))
        return (yield from self.call("GET", f"{path}/prompt", PromptState, query={"prompt_id": prompt_id}))

    def delete_prompt(self, run: str, prompt_id: str) -> Exchange[None]:
        """Erase a prompt with its text, vectors and outcomes. This cannot be undone.

        The run's log is compacted up to now: rewinds, retractions and forks cannot reach back behind this call.

        Raises:
            NotFound: There is no such run or prompt.
        """
        path = _run_path("delete_prompt", run)
        with kept_to("delete_prompt", "prompt_id"):
            _PROMPT_ID.validate_python(prompt_id)
        if _PLAIN_ID.fullmatch(prompt_id):
            return (yield from self.delete(f"{path}/prompts/{prompt_id}"))
        return (yield from self.delete(f"{path}/prompt", query={"prompt_id": prompt_id}))

    def observe(
        self,
        run: str,
        step: int,
        observations: Sequence[Observation | Mapping[str, object]],
        *,
        request_id: str | None = None,
        selection_id: str | None = None,
        confirm_step: bool = False,
    ) -> Exchange[ObserveReply]:
        """Report outcomes of attempts. Either all observations are accepted or none.

        Args:
            step: The policy version that made the attempts.
            observations: 1 to 10,000: `Observation`, or mappings with its fields.
            request_id: Names this report: the same id again returns the first answer and writes nothing. A
                fresh one by default, which makes the retries of this call safe, but not a second call.
            selection_id: The selection whose outcomes these are. They may come late, out of order, in several
                calls, and with outcomes of other prompts.
            confirm_step: Confirms a step that lies far beyond the run's newest: more than 100,000 steps, unless the
                service has another limit.

        Raises:
            NotFound: There is no such run, or no such prompt and no text to add it.
            Conflict: `request_id` was used with another report, or a rewind has voided the selection; or the step
                needs to be confirmed.
        """
        request_id = uuid4().hex if request_id is None else request_id
        request = _request("observe", ObserveRequest, locals())
        query = _confirmation(confirm_step)
        return (
            yield from self.call("POST", "/observe", ObserveReply, query=query, content=_json(request), run=request.run)
        )

    def observe_decision(
        self, decision_id: str, rewards: Sequence[float], *, request_id: str | None = None
    ) -> Exchange[ObserveReply]:
        """Report a verdict on an answer whose budget the service decided: a user's thumb, a test, a judge.

        Args:
            decision_id: Of the budget's reply, or of the gateway's header `x-evenodds-decision-id`.
            rewards: In [0, 1], one for each attempt that was finished.
            request_id: Of a further verdict on the same decision: without one the same verdict counts once.

        Raises:
            NotFound: There is no such decision, or its run was deleted.
            ProblemError: `decision_expired`: it was made more than 24 hours ago.
            Conflict: The decision, or `request_id`, has another verdict already.
        """
        request = _request("observe_decision", VerdictRequest, locals())
        return (yield from self.call("POST", "/observe", ObserveReply, content=_json(request)))

    def predict(
        self,
        run: str,
        prompts: Iterable[str | PromptRef | Mapping[str, object]],
        *,
        step: int | None = None,
        group_size: int | None = None,
    ) -> Exchange[PredictReply]:
        """How likely each prompt is to be solved, in the order asked.

        Args:
            prompts: 1 to 10,000 prompts. A string is a prompt id; `PromptRef`, or a mapping with its fields,
                may hold a new text instead.
            step: The policy version to predict for; the run's newest by default. The further it
                lies ahead of a prompt's own outcomes, the less these count. For an earlier version they count in full.
            group_size: Attempts per prompt that `informative_probability` is about; the run's by default.

        Raises:
            NotFound: There is no such run, or no prompt of that id in its pool.
        """
        request = _request("predict", PredictRequest, {**locals(), "prompts": _references(prompts)})
        return (yield from self.call("POST", "/predict", PredictReply, content=_json(request), run=request.run))

    def select_batch(
        self,
        run: str,
        step: int,
        batch_size: int | None = None,
        *,
        informative_groups: int | None = None,
        fill_factor: float | None = None,
        max_prompts: int | None = None,
        update_cost: float | None = None,
        seed: int = 0,
        candidates: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        categories: Mapping[str, float] | None = None,
        categories_at_most: Mapping[str, float] | None = None,
        target_rate: float | None = None,
        group_size: int | None = None,
        acquisition: Acquisition | None = None,
        optimism: float | None = None,
        diversity: float | None = None,
        cooldown_steps: int | None = None,
        max_visits: int | None = None,
        allow_outstanding: bool = False,
        confirm_step: bool = False,
        groups: Mapping[str, float] | None = None,
        groups_at_most: Mapping[str, float] | None = None,
    ) -> Exchange[SelectReply]:
        """Choose the prompts of a step. The same arguments again return the same batch. Steps may come in any order.

        This method is long because a choice may differ from the run in so many settings.

        Args:
            step: The policy version that will attempt the batch.
            batch_size: Prompts to choose, in [1, 10,000].
            informative_groups: In place of `batch_size`: choose as many prompts as it takes to find so many informative
                groups in one wave, in expectation.
            fill_factor: Expected informative groups over those asked for, in [0.1, 4]; 1 by default.
            max_prompts: Prompts at most, 6 times `informative_groups` by default.
            update_cost: Of a group, in units of the cost of its rollouts: the reply says whether filling pays.
            seed: Seed of all chance in the choice, in [0, 2**63).
            candidates: Prompt ids to choose among; the whole pool by default.
            exclude: Prompt ids to leave out.
            categories: Least share of the batch by category; the shares sum to at most 1. Instead of the run's.
            categories_at_most: Largest share of the batch by category. Instead of the run's.
            target_rate: Instead of the run's, for this batch; so are the arguments up to `max_visits`.
            allow_outstanding: Choose prompts again whose outcomes from earlier selections have not come yet. They
                are left out otherwise, for the run's `lease_steps`, while enough others remain.
            confirm_step: As in `observe`.
            groups, groups_at_most: Older names of `categories` and `categories_at_most`, until 1.0.

        Raises:
            NotFound: There is no such run, candidate or category.
            Conflict: The step has a batch already, by other arguments; too few prompts may be chosen; a category's
                least share is above its largest; informative groups are asked for where no prompt rests; or the step
                needs to be confirmed.
        """
        given = {**locals(), "allow_outstanding": allow_outstanding or None}
        request = _request("select_batch", SelectRequest, given)
        query = _confirmation(confirm_step)
        return (
            yield from self.call(
                "POST", "/select_batch", SelectReply, query=query, content=_json(request), run=request.run
            )
        )

    def allocate(
        self,
        run: str,
        prompts: Iterable[str | AllocatePrompt | Mapping[str, object]],
        budget: float,
        *,
        objective: Objective = "solve",
        method: AllocationMethod = "greedy",
        min_attempts: int | None = None,
        max_attempts: int | None = None,
    ) -> Exchange[AllocateReply]:
        """How many attempts each prompt should get out of a common budget. Nothing is stored.

        Args:
            prompts: 1 to 10,000 prompts. A string is a prompt id; `AllocatePrompt`, or a mapping with its fields, may
                hold a new text instead, the `cost` of one attempt, and limits of its own.
            budget: Attempts for all prompts together, or the unit of the costs; above 0.
            objective: `solve`, one success is enough; `signal`, the chance that a training group is informative.
            method: `greedy`, the greatest gain per cost first; `bins`, by bins of predicted difficulty.
            min_attempts: Of each prompt; 1 by default. Under `signal` 2 is the default and the minimum.
            max_attempts: Of each prompt, at most 1,024; as many as a call may consider by default.

        Raises:
            NotFound: There is no such run, or no prompt of that id in its pool.
        """
        request = _request("allocate", AllocateRequest, {**locals(), "prompts": _references(prompts)})
        return (yield from self.call("POST", "/allocate", AllocateReply, content=_json(request), run=request.run))

    def budget(
        self,
        run: str,
        prompt: str | PromptRef | Mapping[str, object],
        *,
        policy: str = "default",
        failures: int = 0,
        step: int | None = None,
        deadline_ms: float | None = None,
    ) -> Exchange[BudgetReply]:
        """How many attempts, and how much effort, one request deserves. Nothing is stored.

        A gateway needs a deadline and no errors: see `evenodds.gateway.GatewayBudget`.

        Args:
            prompt: A string is a prompt id; `PromptRef`, or a mapping with its fields, may hold a new text instead.
            policy: Name of the run's budget policy.
            failures: Attempts of this request that failed and are not reported by `observe`.
            step: Version of the served model, under which a verdict by `decision_id` counts; the newest by default.
            deadline_ms: Time after which the service gives up, in (0, 60,000].

        Raises:
            NotFound: There is no such run or policy, or no prompt of that id in the pool.
            Unavailable: Too many requests wait, or the deadline passed.
        """
        asked = {"prompt_id": prompt} if isinstance(prompt, str) else prompt
        request = _request("budget", BudgetRequest, {**locals(), "prompt": asked})
        return (yield from self.call("POST", "/budget", BudgetReply, content=_json(request), run=request.run))

    def put_budget_policy(
        self,
        run: str,
        policy: str = "default",
        *,
        mode: BudgetMode | None = None,
        target_attempts: float | None = None,
        min_attempts: int | None = None,
        max_attempts: int | None = None,
        price: float | None = None,
        tiers: Sequence[Tier | Mapping[str, object]] | None = None,
    ) -> Exchange[PolicyState]:
        """Create a budget policy or replace it whole: what is left out has its default.

        Args:
            policy: Its name: letters, digits, `.`, `_`, `-`; at most 64 characters.
            mode: `parallel` (default), all attempts at once; `sequential`, one after another until a success.
            target_attempts: Attempts per request on average, 4 by default.
            min_attempts, max_attempts: Of each request, 1 and 32 by default, in [1, 1024].
            price: A fixed price in [0, 1], instead of the one that keeps to the target.
            tiers: Efforts by falling `at_least`, the last one's 0; low, medium and high by default.

        Returns:
            The policy with its version.

        Raises:
            NotFound: There is no such run.
            Conflict: The run holds as many policies as it may.
        """
        update = _request("put_budget_policy", PolicyUpdate, locals())
        path = _run_path("put_budget_policy", run)
        with kept_to("put_budget_policy", "policy"):
            _POLICY_NAME.validate_python(policy)
        path = f"{path}/budget_policies/{_segment(policy)}"
        return (yield from self.call("PUT", path, PolicyState, content=_json(update)))

    def budget_policies(self, run: str) -> Exchange[PolicyList]:
        """The budget policies of a run, by name; `default` is always there.

        Raises:
            NotFound: There is no such run.
        """
        path = f"{_run_path('budget_policies', run)}/budget_policies"
        return (yield from self.call("GET", path, PolicyList))

    def healthz(self) -> Exchange[Health]:
        """Whether the process is alive."""
        return (yield from self.call("GET", "/healthz", Health, replying=(503,)))

    def readyz(self) -> Exchange[Health]:
        """Whether the service can answer. `unavailable` with its reasons is a value, not an error."""
        return (yield from self.call("GET", "/readyz", Health, replying=(503,)))


def _request(call: str, model: type[RequestT], given: Mapping[str, Any]) -> RequestT:
    return request_of(call, model, given, stacklevel=5)  # of the caller: of this, the call, what drives it, the method


def _run_path(call: str, run: str) -> str:
    with kept_to(call, "run"):
        return f"/runs/{_RUN.validate_python(run)}"


def _segment(value: str) -> str:
    """Percent-encoded whole, dots too: a client or a proxy would resolve the segments `.` and `..`."""
    return quote(value, safe="").replace(".", "%2E")


def _cursor(cursor: str | None) -> dict[str, str]:
    return {} if cursor is None else {"cursor": cursor}


def _json(request: Request) -> bytes:
    """What was given and no more: what is left out is the service's to decide."""
    return request.model_dump_json(exclude_none=True, exclude_unset=True).encode()


def _references(
    prompts: Iterable[str | PromptRef | Mapping[str, object]] | Iterable[str | AllocatePrompt | Mapping[str, object]],
) -> object:
    if isinstance(prompts, (str, Mapping)):
        return prompts  # one prompt is not a list of prompts: the schema refuses it
    return [{"prompt_id": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]


def _prompt_batches(prompts: Iterable[PromptIn | Mapping[str, object]]) -> list[bytes]:
    """The bodies of the requests, each of at most MAX_ITEMS prompts and about MAX_CALL_BYTES."""
    bodies: list[bytes] = []
    batch: list[bytes] = []
    n_bytes = 0
    for index, prompt in enumerate(prompts):
        with kept_to("add_prompts", f"prompts[{index}]"):
            item = _json(PromptIn.model_validate(prompt))
        if batch and (len(batch) == MAX_ITEMS or n_bytes + len(item) > MAX_CALL_BYTES):
            bodies.append(_prompts_body(batch))
            batch, n_bytes = [], 0
        batch.append(item)
        n_bytes += len(item) + 1
    if batch:
        bodies.append(_prompts_body(batch))
    return bodies


def _prompts_body(items: Sequence[bytes]) -> bytes:
    return b'{"prompts":[' + b",".join(items) + b"]}"


def _confirmation(confirm_step: bool) -> dict[str, str] | None:
    return {"confirm_step": "true"} if confirm_step else None
