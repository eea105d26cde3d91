"""What other frameworks call our keys: Hugging Face's Trainer and models, Megatron-LM, GPT-NeoX,
nanoGPT, torchtitan, Lightning. For "did you mean" and for `attnres-train options`; such a word is
never read as if it were ours, for its meaning may differ (see `NOTES`).
"""

from __future__ import annotations

import difflib
from functools import cache

# Key of ours -> words of others, in small letters, "-" written as "_". A word may stand in several
# rows. A name that is a key of ours in another section (`seed`, `micro_batch_size`) needs no row.
WORDS = {
    "run.name": "run_name exp_name experiment_name job_name wandb_run_name wandb_exp_name",
    "run.dir": "output_dir out_dir default_root_dir dump_folder save save_dir",
    "run.seed": "random_seed",
    "model.hidden_size": "n_embd d_model dim hidden_dim embed_dim model_dim",
    "model.num_layers": "num_hidden_layers n_layers n_layer",
    "model.vocab_size": "padded_vocab_size n_vocab",
    "model.intermediate_size": "ffn_hidden_size d_ff n_inner ffn_dim",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon norm_epsilon",
    "model.initializer_range": "init_method_std init_std",
    "model.kda.num_heads": "num_attention_heads n_head n_heads",
    "model.mla.num_heads": "num_attention_heads n_head n_heads",
    "model.kda.head_dim": "kv_channels",
    "model.moe.num_experts": "n_routed_experts num_local_experts moe_num_experts",
    "model.moe.num_experts_per_token": "num_experts_per_tok moe_router_topk moe_top_k top_k topk",
    "model.moe.num_shared_experts": "n_shared_experts",
    "model.moe.intermediate_size": "moe_intermediate_size moe_ffn_hidden_size",
    "model.moe.routed_scaling_factor": "moe_router_topk_scaling_factor",
    "model.moe.first_dense_layers": "first_k_dense_replace",
    "model.moe.bias_update_rate": "moe_router_bias_update_rate load_balance_coeff",
    "parallel.pipeline_model_parallel_size": "pp pp_size pipeline_parallel_size "
    "pipeline_parallel_degree pipe_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size": "vpp vpp_size virtual_pipeline_parallel_size "
    "num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage",
    "parallel.tensor_model_parallel_size": "tp tp_size tensor_parallel_size tensor_parallel_degree "
    "model_parallel_size",
    "parallel.expert_model_parallel_size": "ep ep_size expert_parallel_size expert_parallel_degree",
    "parallel.context_parallel_size": "cp cp_size context_parallel_degree",
    "parallel.layout": "pipeline_model_parallel_layout",
    "pipeline.schedule": "pipeline_parallel_schedule",
    "pipeline.timeout_seconds": "ddp_timeout dist_timeout distributed_timeout_minutes",
    "train.train_iters": "max_steps max_iters steps num_steps total_steps train_steps "
    "num_train_steps max_train_steps num_iterations iterations",
    "train.seq_length": "seq_len sequence_length max_seq_len max_seq_length max_length block_size "
    "context_length n_ctx max_position_embeddings encoder_seq_length",
    "train.micro_batch_size": "batch_size per_device_train_batch_size device_batch_size "
    "local_batch_size train_micro_batch_size_per_gpu mbs",
    "train.global_batch_size": "batch_size train_batch_size total_batch_size gbs "
    "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches",
    "train.stop_after": "exit_interval",
    "train.precision": "bf16 fp16 fp32 dtype torch_dtype mixed_precision params_dtype",
    "train.recompute": "gradient_checkpointing activation_checkpointing activation_checkpoint "
    "checkpoint_activations recompute_activations recompute_granularity",
    "train.clip_grad": "max_grad_norm grad_clip gradient_clip_val gradient_clipping max_norm",
    "train.eval_interval": "eval_steps val_check_interval",
    "train.eval_iters": "eval_batches limit_val_batches",
    "train.device": "accelerator use_cpu no_cuda",
    "optimizer.kind": "optim optimizer_type",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.momentum": "muon_momentum",
    "lr_schedule.kind": "lr_scheduler_type lr_decay_style decay_type scheduler",
    "lr_schedule.warmup_iters": "warmup_steps num_warmup_steps lr_warmup_iters warmup "
    "warmup_ratio lr_warmup_fraction",
    "lr_schedule.decay_end_iter": "lr_decay_iters lr_decay_steps",
    "lr_schedule.wsd_decay_iters": "lr_wsd_decay_iters",
    "lr_schedule.min_lr_ratio": "min_lr min_lr_factor",
    "data.corpus": "dataset dataset_name dataset_path data_path train_data train_file",
    "data.tokenizer.kind": "tokenizer_type",
    "data.tokenizer.path": "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_model "
    "vocab_file",
    "data.cache_dir": "data_cache_path",
    "data.reset_at_documents": "reset_attention_mask",
    "data.mask_document_ends": "eod_mask_loss",
    "checkpoint.save_interval": "save_steps save_every checkpoint_interval checkpoint_factor",
    "checkpoint.keep_last": "save_total_limit keep_latest_k keep_last_n_checkpoints save_top_k",
    "checkpoint.resume": "resume_from_checkpoint ckpt_path init_from load_dir",
    "log.interval": "logging_steps log_interval log_freq log_every_n_steps",
    "log.tensorboard": "enable_tensorboard tensorboard_dir",
    "log.wandb.enabled": "wandb_log use_wandb enable_wandb report_to",
    "log.wandb.project": "wandb_project",
}

# Word -> the override that says the same as the word switched on.
SWITCHES = {
    "bf16": "train.precision=bf16",
    "fp32": "train.precision=fp32",
    "fp16": "train.precision=bf16",
    "gradient_checkpointing": "train.recompute=full",
    "activation_checkpointing": "train.recompute=full",
    "checkpoint_activations": "train.recompute=full",
    "recompute_activations": "train.recompute=selective",
    "resume_from_checkpoint": "checkpoint.resume=auto",
    "use_cpu": "train.device=cpu",
    "no_cuda": "train.device=cpu",
    "wandb_log": "log.wandb.enabled=true",
    "use_wandb": "log.wandb.enabled=true",
    "enable_wandb": "log.wandb.enabled=true",
    "enable_tensorboard": "log.tensorboard=true",
    "reset_attention_mask": "data.reset_at_documents=true",
    "eod_mask_loss": "data.mask_document_ends=true",
}

_PRODUCT = (
    "the global batch is micro-batch x accumulated micro-batches x replicas, and we state both ends"
)
_SHARE = "we count steps, not a share of the run"
_BETAS = "both betas in one list, e.g. [0.9, 0.95]"
# Word -> how its value differs from that of our key, so that it is not repeated as it stands.
NOTES = {
    "fp16": "there is no fp16",
    "gradient_accumulation_steps": _PRODUCT,
    "grad_accum_steps": _PRODUCT,
    "accumulate_grad_batches": _PRODUCT,
    "num_layers_per_virtual_pipeline_stage": "we count the chunks of a rank, not their layers",
    "distributed_timeout_minutes": "seconds, not minutes",
    "warmup_ratio": _SHARE,
    "lr_warmup_fraction": _SHARE,
    "warmup": "we count steps; GPT-NeoX a share of the run",
    "min_lr": "a share of optimizer.lr, not a rate",
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "beta1": _BETAS,
    "beta2": _BETAS,
    "dataset": "a list, e.g. [{kind: jsonl, path: FILE}]",
    "dataset_name": "a list of files here, e.g. [{kind: jsonl, path: FILE}]",
    "dataset_path": "a list, e.g. [{kind: jsonl, path: FILE}]",
    "data_path": "a list, e.g. [{kind: indexed, path: PREFIX, weight: 1}]",
    "train_data": "a list, e.g. [{kind: jsonl, path: FILE}]",
    "train_file": "a list, e.g. [{kind: jsonl, path: FILE}]",
    "report_to": "true or false; log.tensorboard is the other one",
    "tensorboard_dir": "true or false; the folder is the run's",
    "accelerator": "cpu, cuda or auto",
}


def plain(word: str) -> str:
    """``word`` as `WORDS` has it: without dashes in front, in small letters, with underscores."""
    return word.lstrip("-").replace("-", "_").lower()


def keys_for(word: str) -> list[str]:
    """Our keys for a `plain` word of others; none where it is not known."""
    return _by_word().get(word, [])


def keys_near(word: str) -> list[str]:
    """The same for a word that is nearly one of others."""
    near = difflib.get_close_matches(word, _by_word(), n=1, cutoff=0.8)
    return keys_for(near[0]) if near else []


def words_for(key: str) -> list[str]:
    """What others call ``key`` of ours."""
    return WORDS.get(key, "").split()


@cache
def _by_word() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in WORDS:
        for word in words_for(key):
            found.setdefault(word, []).append(key)
    return found
