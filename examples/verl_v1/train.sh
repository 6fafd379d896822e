#!/usr/bin/env bash
# GRPO on GSM8K with verl 0.9.1, as prepared by its examples/data_preprocess/gsm8k.py.
set -euo pipefail
export VERL_USE_EXTERNAL_MODULES=evenodds.integrations.verl_v1
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$HOME/data/gsm8k/train.parquet" \
    data.val_files="$HOME/data/gsm8k/test.parquet" \
    data.train_batch_size=256 \
    +data.evenodds.base_url="${EVENODDS_URL:-http://127.0.0.1:8000}" \
    +data.evenodds.run=verl-v1-gsm8k \
    +data.evenodds.run_settings.group_size=8 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    trainer.n_gpus_per_node="${GPUS:-1}" \
    trainer.use_v1=true \
    trainer.v1.trainer_mode=sync \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    "$@"
