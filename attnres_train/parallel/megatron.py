"""The process grid, laid out by megatron-core: replicas adjacent, the pipeline outermost."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from attnres_train.config.schema import ParallelConfig
from attnres_train.megatron import megatron_core


def build_grid(parallel: ParallelConfig) -> tuple[ProcessGroup, ProcessGroup]:
    """Return this rank's (pipeline, data-parallel) groups of the default process group's grid."""
    # Imported here: it takes seconds.
    parallel_state = megatron_core("parallel_state")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        create_gloo_process_groups=False,
    )
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    data = parallel_state.get_data_parallel_group()
    return pipeline, data


def destroy_grid() -> None:
    """Forget the groups, so that another grid can be built in this process."""
    megatron_core("parallel_state").destroy_model_parallel()
