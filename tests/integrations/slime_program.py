"""Rollouts of slime's or miles' own `generate_rollout`, from a checkout, with guesses in the place of its engines.

No registry has slime, so this is run by hand, beside a service, with the packages that slime's rollouts import
(`httpx pylatexenc pyarrow ray torch transformers`):

    PYTHONPATH=CHECKOUT python tests/integrations/slime_program.py http://127.0.0.1:8000 RUN FOLDER [miles]

miles wants `pybase64`, `sglang-router` and what an ImportError names besides; SGLang and Megatron, which need a GPU,
are left empty. Three rollouts with the dynamic filter, the data set, samples and buffer; then the state that was saved
after the second is loaded anew, and the third is made again. It ends with an error where the service has observed
anything else.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from by_hand import observed  # type: ignore[import-not-found]  # it lies beside this file
from left_empty import leave_empty  # type: ignore[import-not-found]  # it lies beside this file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FRAMEWORK = sys.argv[4] if len(sys.argv) > 4 else "slime"
if FRAMEWORK == "miles":
    leave_empty("megatron", "sglang")

from evenodds import Client  # noqa: E402
from evenodds.integrations.slime import KEY, EvenOddsDataSource  # noqa: E402

generate_rollout = import_module(f"{FRAMEWORK}.rollout.sglang_rollout").generate_rollout
FILTERS = f"{FRAMEWORK}.rollout.filter_hub.dynamic_sampling_filters"
init_http_client = import_module(f"{FRAMEWORK}.utils.http_utils").init_http_client
N_PROMPTS, BATCH_SIZE, N_ATTEMPTS = 24, 4, 4
attempts: dict[tuple[str, int], list[float | None]] = {}


async def guess(args: Any, sample: Any, sampling_params: Any) -> Any:
    """An attempt: half are right, those at every third prompt all. Some give two samples, and some fail."""
    chosen, number = sample.metadata[KEY], int(sample.label)
    correct = float(number % 3 == 0 or random.random() < 0.5)
    fails = number % 5 == 0 and sample.index % N_ATTEMPTS == 0
    attempts.setdefault((chosen["prompt_id"], chosen["step"]), []).append(None if fails else correct)
    sample.tokens, sample.response, sample.response_length = [1, 2, 3], "3", 1
    sample.reward = 0.0 if fails else correct
    sample.status = sample.Status.FAILED if fails else sample.Status.COMPLETED
    return sample


async def nothing(*_: Any) -> None:
    """In the place of what asks SGLang's settings."""


class Router(BaseHTTPRequestHandler):
    """What slime asks its router for when a rollout ends: the engines whose requests are to be ended, here none."""

    def do_GET(self) -> None:
        body = json.dumps({"workers": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def arguments(url: str, run: str, folder: Path, port: int) -> SimpleNamespace:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    rows = [
        {"prompt": f"What is {i} + 0?", "label": str(i), "metadata": {"prompt_id": f"q{i}"}} for i in range(N_PROMPTS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {
        "n_samples_per_prompt": N_ATTEMPTS,
        "rollout_batch_size": BATCH_SIZE,
        "over_sampling_batch_size": BATCH_SIZE,
        "rollout_global_dataset": True,
        "prompt_data": str(folder / "train.jsonl"),
        "hf_checkpoint": str(folder),
        "input_key": "prompt",
        "label_key": "label",
        "metadata_key": "metadata",
        "dynamic_sampling_filter_path": f"{FILTERS}.check_reward_nonzero_std",
        "rollout_all_samples_process_path": "evenodds.integrations.slime.report",
        "custom_generate_function_path": f"{Path(__file__).stem}.guess",
        "rollout_function_path": f"{FRAMEWORK}.rollout.sglang_rollout.generate_rollout",
        "sglang_router_ip": "127.0.0.1",
        "sglang_router_port": port,
        "sglang_server_concurrency": 8,
        "rollout_num_engines": 1,
        "rollout_num_gpus": 1,
        "eval_num_gpus": 0,
        "rollout_num_gpus_per_engine": 1,
        "rollout_top_p": 1.0,
        "rollout_seed": 1,
        "save": str(folder / "checkpoints"),
        "load": str(folder / "checkpoints"),
        "evenodds": {"base_url": url, "run": run, "deadline_seconds": 60, "outbox": str(folder / "outbox")},
    }

    class Arguments(SimpleNamespace):
        def __getattr__(self, name: str) -> None:  # slime's parser sets some hundred more, all off here
            if name.startswith("__"):
                raise AttributeError(name)

    return Arguments(**given)


def rolled_out(args: Any, source: Any, *rollouts: int) -> None:
    for rollout in rollouts:
        output = generate_rollout(args, rollout, source)
        assert len(output.samples) == BATCH_SIZE
        source.save(rollout)
    assert source.connection.selector.flush()


def main(url: str, run: str, folder: Path) -> None:
    sys.modules[Path(__file__).stem] = sys.modules["__main__"]  # as which slime imports `guess`
    folder.mkdir(parents=True, exist_ok=True)
    router = HTTPServer(("127.0.0.1", 0), Router)
    threading.Thread(target=router.serve_forever, daemon=True).start()
    args = arguments(url, run, folder, router.server_port)
    if FRAMEWORK == "miles":
        vars(import_module("miles.utils.dumper_utils"))["configure_sglang"] = nothing
    init_http_client(args)

    first = EvenOddsDataSource(args)
    first.load(-1)
    assert first.connection.selector.wait_until_ready()
    rolled_out(args, first, 0, 1)
    kept = dict(attempts)
    rolled_out(args, first, 2)
    first.connection.selector.close()
    attempts.clear()
    attempts.update(kept)
    second = EvenOddsDataSource(args)
    second.load(1)
    rolled_out(args, second, 2)

    with Client(url) as client:
        seen = observed(client, run)
    made = set()
    for key, group in attempts.items():
        counted = [reward for reward in group if reward is not None]
        made.add((*key, sum(counted), len(counted)))
    assert set(seen) <= made, f"{seen} is not of {sorted(made)}"
    assert len(set(seen)) == len(seen)
    assert {made_at for _, made_at, *_ in made} == {at for _, at, *_ in seen}  # it ends what is under way
    n_silent = sum(won in (0, n) for *_, won, n in seen)
    sys.stdout.write(f"right: {len(seen)} groups, of which the filter dropped {n_silent}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
