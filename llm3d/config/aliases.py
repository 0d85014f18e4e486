"""What other frameworks call our settings and their values, for hints where one is not known here.

Of transformers, TRL, PEFT, LLaMA-Factory, DeepSpeed, Megatron-LM, torchtitan, verl and vLLM. Names and values are
compared in small letters, with `_` for `-`.
"""

from __future__ import annotations

from collections.abc import Container


def setting_called(name: str, paths: Container[str]) -> str | None:
    """Our setting for another framework's name, the first that is among `paths`; it may go with a value."""
    known = _NAMES.get(_plain(name), ())
    return next((path for path in known if path.partition("=")[0] in paths), None)


def value_called(setting: str, given: object) -> str | None:
    """Our value of a setting for another framework's."""
    return _VALUES.get(setting, {}).get(_plain(given))


def _plain(text: object) -> str:
    return str(text).strip().lower().replace("-", "_")


_OF: dict[str, str] = {  # our setting, and what others call it
    "run.dir": "output_dir save_dir save run_name experiment_dir checkpoint_dir default_local_dir",
    "model.path": "model_name_or_path model_name pretrained_model_name_or_path base_model pretrained hf_model_path "
    "base_model_name_or_path model_id",
    "model.vocab_size": "padded_vocab_size",
    "model.hidden_size": "dim d_model n_embd",
    "model.intermediate_size": "ffn_hidden_size ffn_dim",
    "model.num_hidden_layers": "num_layers n_layers n_layer",
    "model.num_attention_heads": "num_heads n_heads n_head",
    "model.num_key_value_heads": "num_query_groups n_kv_heads num_kv_heads",
    "model.head_dim": "kv_channels",
    "model.rms_norm_eps": "norm_eps norm_epsilon layernorm_epsilon",
    "model.rope_theta": "rotary_base",
    "model.initializer_range": "init_method_std",
    "parallel.tensor": "tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size "
    "tensor_parallel_degree",
    "parallel.pipeline": "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size "
    "pipeline_parallel_degree",
    "parallel.chunks": "vpp virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank "
    "num_layers_per_virtual_pipeline_stage",
    "parallel.schedule": "pipeline_schedule pipeline_parallel_schedule",
    "parallel.sequence": "sequence_parallel",
    "parallel.layers_per_stage": "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers",
    "zero.stage": "zero_stage deepspeed deepspeed_stage zero_optimization fsdp fsdp_config "
    "use_distributed_optimizer data_parallel_shard_degree",
    "zero.offload": "offload_optimizer cpu_offload optimizer_cpu_offload offload",
    "zero.offload_fraction": "optimizer_offload_fraction",
    "precision.compute": "dtype torch_dtype mixed_precision precision_mode half_precision",
    "precision.compute=bf16": "bf16 pure_bf16 bfloat16",
    "precision.compute=fp16": "fp16 half float16",
    "precision.compute=fp32": "fp32 tf32 float32",
    "precision.gradients": "grad_reduce_in_fp32 mixed_precision_reduce accumulate_allreduce_grads_in_fp32",
    "precision.reduce_dtype": "grad_reduce_in_bf16 communication_data_type",
    "precision.loss_scale.initial": "initial_loss_scale initial_scale_power",
    "precision.loss_scale.growth_interval": "loss_scale_window",
    "recompute": "gradient_checkpointing activation_checkpoint activation_checkpointing recompute_granularity "
    "recompute_activations recompute_method recompute_num_layers enable_gradient_checkpointing",
    "data.train": "dataset datasets dataset_name dataset_dir train_file train_files train_data train_dataset data_path "
    "train_data_path",
    "data.valid": "eval_dataset val_dataset val_size val_files valid_data_path validation_file eval_file test_file",
    "data.sequence_length": "cutoff_len max_length max_seq_length seq_length seq_len max_seq_len sequence_len "
    "model_max_length block_size context_length max_prompt_length",
    "data.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_model",
    "data.template": "chat_template chat_template_path prompt_template",
    "data.split_documents": "reset_attention_mask reset_position_ids eod_mask_loss document_mask",
    "data.truncation": "truncation_mode truncation_side",
    "data.turns": "mask_history train_on_last_turn_only",
    "data.columns": "text_column prompt_column prompt_key columns_mapping column_mapping",
    "batch.global": "global_batch_size train_batch_size total_batch_size batch_size gradient_accumulation_steps "
    "grad_accum gradient_accumulation rollout_batch_size",
    "batch.micro": "per_device_train_batch_size micro_batch_size micro_batch train_micro_batch_size_per_gpu "
    "per_device_batch_size local_batch_size per_device_eval_batch_size ppo_micro_batch_size_per_gpu",
    "optim.lr": "learning_rate base_lr max_lr peak_lr actor_learning_rate",
    "optim.min_lr": "min_learning_rate end_lr lr_end",
    "optim.warmup_steps": "lr_warmup_steps lr_warmup_iters warmup_iters num_warmup_steps warmup",
    "optim.warmup_ratio": "lr_warmup_fraction lr_warmup_steps_ratio",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_schedule lr_decay_style scheduler",
    "optim.decay_steps": "lr_wsd_decay_iters num_decay_steps decay_ratio",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_epsilon adam_eps epsilon_adam",
    "optim.weight_decay": "wd",
    "optim.clip_grad_norm": "max_grad_norm clip_grad grad_clip gradient_clipping gradient_clip_val max_norm",
    "train.steps": "max_steps train_iters max_iters total_steps iterations num_train_steps training_steps num_steps "
    "total_training_steps",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs total_epochs",
    "train.stop_after": "exit_interval",
    "train.patience": "early_stopping_patience early_stopping",
    "train.eval_every": "eval_steps eval_interval evaluation_steps val_check_interval test_freq eval_strategy "
    "evaluation_strategy",
    "train.eval_steps": "eval_iters max_eval_steps limit_val_batches",
    "loss.z_loss": "z_loss_coef lm_loss_z_coefficient",
    "loss.label_smoothing": "label_smoothing_factor",
    "checkpoint.every": "save_steps save_interval save_freq save_every checkpoint_interval save_strategy",
    "checkpoint.keep": "save_total_limit keep_latest_k max_actor_ckpt_to_keep",
    "checkpoint.best": "metric_for_best_model load_best_model_at_end best_model_metric",
    "checkpoint.resume": "resume_from_checkpoint load resume_mode load_checkpoint overwrite_output_dir",
    "kernels.attention": "attn_implementation attention_backend attn_backend flash_attn use_flash_attn",
    "log.every": "logging_steps log_interval log_freq log_every",
    "log.tensorboard": "report_to enable_tensorboard tensorboard_dir logging_dir",
    "run.seed": "random_seed data_seed",
    "run.device": "use_cpu no_cuda device_type accelerator",
    "lora.rank": "lora_r r lora_rank use_lora use_peft finetuning_type",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.rslora": "use_rslora",
    "lora.targets": "lora_target lora_targets target_modules lora_target_modules",
    "lora.path": "adapter_name_or_path adapter_path peft_model_id lora_path",
    "sft.prompt_loss": "train_on_prompt completion_only_loss assistant_only_loss train_on_inputs",
    "sft.neftune_alpha": "neftune_noise_alpha",
    "reward.center": "center_rewards_coefficient",
    "dpo.beta": "beta pref_beta",
    "dpo.loss": "loss_type pref_loss",
    "dpo.rpo_alpha": "pref_ftx sft_weight",
    "dpo.label_smoothing": "dpo_label_smoothing",
    "dpo.reference": "ref_model precompute_ref_log_probs reference_free",
    "orpo.beta": "beta pref_beta lambda orpo_lambda lam",
    "simpo.beta": "beta pref_beta",
    "simpo.gamma": "simpo_gamma",
    "kto.beta": "beta pref_beta",
    "kto.desirable_weight": "kto_chosen_weight",
    "kto.undesirable_weight": "kto_rejected_weight",
    "ppo.rewards": "reward_model reward_model_path reward_funcs reward_function custom_reward_function",
    "ppo.advantages": "adv_estimator advantage_estimator",
    "ppo.critic": "value_model value_model_path critic_model",
    "ppo.critic_lr": "critic_learning_rate",
    "ppo.kl_coefficient": "beta kl_coef init_kl_coef init_kl_coeff kl_loss_coef kl_penalty_coef",
    "ppo.kl_estimator": "kl_penalty kl_loss_type",
    "ppo.kl_in_loss": "use_kl_loss",
    "ppo.kl_target": "target_kl target ppo_target",
    "ppo.epochs": "ppo_epochs num_ppo_epochs num_iterations",
    "ppo.minibatches": "num_mini_batches mini_batch_size ppo_mini_batch_size",
    "ppo.clip": "cliprange clip_ratio clip_range epsilon eps_clip ppo_clip",
    "ppo.clip_high": "epsilon_high clip_ratio_high",
    "ppo.value_clip": "cliprange_value value_clip_range",
    "ppo.lam": "lambda lambd gae_lambda",
    "ppo.whiten_rewards": "ppo_whiten_rewards",
    "ppo.entropy_coefficient": "entropy_coeff ent_coef entropy_coef",
    "ppo.missing_end_penalty": "missing_eos_penalty",
    "ppo.score_clip": "reward_clip cliprange_reward reward_clip_range",
    "ppo.scale_scores": "ppo_score_norm use_score_norm use_score_scaling",
    "ppo.rollout_tensor": "rollout_tensor_model_parallel_size vllm_tensor_parallel_size",
    "generate.num_replies": "num_generations num_return_sequences n n_samples rollout_n",
    "generate.max_new_tokens": "max_tokens max_completion_length response_length max_response_length max_gen_len "
    "generate_max_len",
    "generate.temperature": "do_sample temp",
    "generate.max_sequences": "max_num_seqs max_batch_size",
    "generate.cache_gib": "gpu_memory_utilization kv_cache_free_gpu_mem_fraction swap_space",
    "generate.cuda_graphs": "enforce_eager cuda_graph use_cuda_graph",
    "generate.stop": "stop_strings stop_words stop_sequences",
}
_NAMES: dict[str, tuple[str, ...]] = {}
for _ours, _theirs in _OF.items():
    for _name in _theirs.split():
        _NAMES[_name] = (*_NAMES.get(_name, ()), _ours)

_DTYPES = {
    "bfloat16": "bf16",
    "torch.bfloat16": "bf16",
    "bf16_mixed": "bf16",
    "float16": "fp16",
    "torch.float16": "fp16",
    "half": "fp16",
    "fp16_mixed": "fp16",
    "float32": "fp32",
    "torch.float32": "fp32",
    "float": "fp32",
    "full": "fp32",
    "no": "fp32",
    "tf32": "fp32",
}
_VALUES: dict[str, dict[str, str]] = {
    "data.turns": {
        "each": "split",
        "every": "split",
        "separate": "split",
        "single": "split",
        "final": "last",
        "last_turn": "last",
        "latest": "last",
        "assistant": "all",
        "true": "all",
    },
    "data.truncation": {
        "keep_end": "left",
        "start": "left",
        "head": "left",
        "keep_start": "right",
        "end": "right",
        "tail": "right",
        "truncate": "right",
        "cut": "right",
        "true": "right",
        "longest_first": "right",
        "none": "drop",
        "null": "drop",
        "skip": "drop",
        "filter": "drop",
        "delete": "drop",
        "ignore": "drop",
        "discard": "drop",
        "do_not_truncate": "drop",
        "false": "drop",
    },
    "run.device": {"gpu": "cuda", "none": "auto", "null": "auto"},
    "precision.compute": _DTYPES,
    "precision.gradients": {name: ours for name, ours in _DTYPES.items() if ours != "fp16"},
    "precision.moments": {name: ours for name, ours in _DTYPES.items() if ours != "fp16"},
    "recompute": {
        "true": "full",
        "block": "full",
        "uniform": "full",
        "layer": "full",
        "unsloth": "full",
        "layernorm": "selective",
        "mlp_act": "selective",
        "op": "selective",
        "false": "none",
        "null": "none",
        "off": "none",
    },
    "zero.offload": {"cpu": "optimizer", "true": "optimizer", "false": "none", "null": "none"},
    "parallel.schedule": {
        "interleaved1f1b": "interleaved",
        "interleaved_1f1b": "interleaved",
        "vpp": "interleaved",
        "afab": "gpipe",
    },
    "optim.schedule": {
        "cosine_with_min_lr": "cosine",
        "cosine_annealing": "cosine",
        "warmup_stable_decay": "wsd",
        "constant_with_warmup": "constant",
        "none": "constant",
        "polynomial": "linear",
    },
    "kernels.backend": {
        "te": "transformer_engine",
        "transformerengine": "transformer_engine",
        "torch": "reference",
        "pytorch": "reference",
        "eager": "reference",
        "cuda": "native",
        "cpu": "native",
        "fused": "native",
    },
    "kernels.attention": {
        "flash": "fa2",
        "flash_attn": "fa2",
        "flash_attention_2": "fa2",
        "flash_attention_3": "fa3",
        "flash_attention_4": "fa4",
        "cudnn_attention": "cudnn",
        "fused": "cudnn",
        "sdpa": "auto",
    },
    "dpo.loss": {"dpo": "sigmoid", "cdpo": "sigmoid", "slic": "hinge", "robust_dpo": "robust"},
    "dpo.reference": {
        "precompute": "cached",
        "precomputed": "cached",
        "cache": "cached",
        "online": "live",
        "model": "live",
        "free": "none",
        "reference_free": "none",
        "null": "none",
    },
    "dpo.rpo_mean": {"sample": "sequence", "reply": "sequence", "tokens": "token"},
    "ppo.advantages": {"ppo": "gae", "group": "grpo", "leave_one_out": "rloo"},
    "ppo.kl_estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
    "ppo.loss_mean": {
        "token_mean": "token",
        "dapo": "token",
        "seq_mean_token_mean": "sequence",
        "grpo": "sequence",
        "reply": "sequence",
        "sample": "sequence",
    },
}
