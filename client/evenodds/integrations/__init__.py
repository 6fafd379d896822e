"""Where `PromptSelector` meets the frameworks: one module each, which alone imports its framework.

    connection  what the others share
    torch       Sampler, IterableDataset, one choice for all ranks
    trl         GRPOTrainer: dataset, sampler, reward functions, checkpoints (Unsloth and ms-swift too)
    verl        the curriculum sampler of verl <= 0.7.1
    verl_v1     the V1 trainers of verl >= 0.9
    slime       data source (miles too)
    prime_rl    task sampler
    trinity     task selector of Trinity-RFT
    nemo_rl     custom dataloader of NeMo-RL
    tinker      dataset of tinker-cookbook
    skyrl       trainer of SkyRL
    openrlhf    data loader and samples generator of OpenRLHF
    ray         the service and its refits on a Ray cluster
    litellm     budgets before and outcomes after each call of LiteLLM's proxy

Importing `evenodds` or this package imports none of them. `examples/` shows each at work.
"""
