"""A step of a trainer by the Python client that openapi-python-client generates. Argument: the service's address."""

from __future__ import annotations

import sys

from generated import AuthenticatedClient
from generated.api.loop import observe, select_batch
from generated.api.prompts import add_prompts
from generated.api.runs import get_report, get_run, list_runs, put_run
from generated.models import (
    Observation,
    ObserveReply,
    ObserveRequest,
    Problem,
    PromptsAdded,
    PromptsIn,
    RunPage,
    RunReport,
    RunState,
    RunUpdate,
    SelectReply,
    SelectRequest,
)

client = AuthenticatedClient(base_url=sys.argv[1], token="none is asked for")

created = put_run.sync("generated", client=client, body=RunUpdate(embedder="none"))
assert isinstance(created, RunState), created
prompts = PromptsIn.from_dict({"prompts": [{"prompt_id": f"p{i}", "text": f"{i} + {i} = ?"} for i in range(8)]})
added = add_prompts.sync("generated", client=client, body=prompts)
assert isinstance(added, PromptsAdded), added
batch = select_batch.sync(client=client, body=SelectRequest(run="generated", step=0, batch_size=4))
assert isinstance(batch, SelectReply), batch
outcomes = [Observation(prompt_id=p.prompt_id, successes=1.0, attempts=8) for p in batch.prompts]
report = ObserveRequest(run="generated", step=0, observations=outcomes, request_id="0", selection_id=batch.selection_id)
observed = observe.sync_detailed(client=client, body=report)
assert isinstance(observed.parsed, ObserveReply), observed
assert observed.parsed.accepted == 4
assert "Idempotent-Replayed" not in observed.headers
assert observe.sync_detailed(client=client, body=report).headers["Idempotent-Replayed"] == "true"
served = get_report.sync("generated", client=client)
assert isinstance(served, RunReport), served
page = list_runs.sync(client=client)
assert isinstance(page, RunPage), page
assert [run.run for run in page.runs] == ["generated"]
refused = get_run.sync("missing", client=client)
assert isinstance(refused, Problem), refused
assert refused.code == "run_unknown"
