"""Names that a script for transformers or TRL may pass to a config, although they mean nothing here: with any value, or
only with one that asks for nothing."""

from typing import Any

from jaxtune.options import ANY, NOT_YET


def _any(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), ANY)


WITHOUT_EFFECT = {
    # How torch computes, moves data and speaks among processes.
    **_any("""
        bf16 fp16 bf16_full_eval fp16_full_eval tf32 fp16_opt_level fp16_backend half_precision_backend
        use_liger_kernel use_liger liger_kernel_config use_cache torch_compile torch_compile_backend torch_compile_mode
        torch_empty_cache_steps gradient_checkpointing_kwargs activation_checkpointing_kwargs
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order local_rank log_on_each_node save_on_each_node
        average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
        ddp_static_graph ddp_backend ddp_timeout skip_memory_metrics
    """),
    # What transformers' trainer does not read itself.
    **_any("do_train do_eval do_predict overwrite_output_dir"),
    # Logging.
    **_any("""
        trackio_space_id trackio_bucket_id trackio_static_space_id logging_nan_inf_filter log_level
        log_level_replica include_num_input_tokens_seen include_tokens_per_second
    """),
    # Evaluations are of the loss, whatever the batch.
    **_any("""
        per_device_eval_batch_size eval_accumulation_steps prediction_loss_only eval_do_concat_batches
        eval_use_gather_object include_for_metrics include_inputs_for_metrics batch_eval_metrics
    """),
    "eval_strategy": "no",
    "eval_steps": NOT_YET,
    "eval_on_start": False,
    "eval_delay": (0, None),
    # Checkpoints: safetensors, and whole when a scheduler ends the run.
    **_any("enable_jit_checkpoint"),
    "save_strategy": "no",
    "save_steps": NOT_YET,
    "save_total_limit": NOT_YET,
    "save_only_model": False,
    "save_safetensors": True,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "resume_from_checkpoint": (None, False),
    "ignore_data_skip": False,
    "restore_callback_states_from_checkpoint": False,
    # The hub, to which nothing is pushed.
    **_any("hub_model_id hub_token hub_private_repo hub_strategy hub_always_push hub_revision"),
    "push_to_hub": False,
    # Order and batches.
    **_any("length_column_name"),
    "auto_find_batch_size": False,
    "data_seed": None,
    "dataloader_drop_last": False,
    "full_determinism": False,
    "group_by_length": False,
    "label_names": (None, ["labels"]),
    "train_sampling_strategy": "random",
    # Other optimizers, devices and debuggers.
    "optim_target_modules": None,
    "use_cpu": False,
    "no_cuda": False,
    "accelerator_config": None,
    "parallelism_config": None,
    "fsdp": (None, False, "", []),
    "fsdp_config": None,
    "deepspeed": None,
    "debug": ("", []),
    # What TRL's configs have in common. A dense model has no router.
    **_any("trust_remote_code router_aux_loss_coef pad_to_multiple_of"),
    "model_init_kwargs": (None, {}),
}
"""Of every config; a field of the same name goes before."""
