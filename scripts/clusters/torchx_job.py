"""A TorchX component that trains on several nodes, for Kubernetes (with Volcano) and TorchX's other schedulers.

    torchx run --workspace "" --scheduler kubernetes --scheduler_args namespace=default,queue=default \\
        scripts/clusters/torchx_job.py:train --image registry/trainer:1 --nodes 2 --gpus_per_node 8 \\
        --mounts type=volume,src=training-claim,dst=/outputs --config train_configs/qwen3_8b.toml \\
        -- --job.dump_folder /outputs/qwen3_8b --checkpoint.enable

Every node runs scripts/train.sh in the image, which holds the checkout; torchrun meets on the first node. A job of
which a node fails is started again as a whole and goes on from its last checkpoint. See docs/clusters.md.
"""

# ruff: noqa: UP006, UP035, UP045  TorchX reads the source: it knows types only as Optional, Dict and List spell them,
# and wants every argument described under "Args".
import shlex
from typing import Dict, List, Optional

import torchx.specs as specs


def train(
    *arguments: str,
    config: str,
    image: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    cpus_per_gpu: int = 8,
    memory_gib_per_gpu: int = 128,
    checkout: str = "/workspace",
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 10,
    max_restarts: int = 0,
    port: int = 29500,
) -> specs.AppDef:
    """Train from a TOML file on one or several nodes.

    Args:
        arguments: more arguments of train.sh, such as --training.steps 1000
        config: TOML file, in the image or on a mount; a relative one starts at the checkout
        image: container image with Python, torch, transformers and the checkout
        nodes: number of nodes
        gpus_per_node: GPUs, and with them processes, on each node; 0 means two processes on the CPU
        cpus_per_gpu: CPU cores for each process
        memory_gib_per_gpu: host memory for each process, in GiB
        checkout: where the checkout lies in the image
        mounts: volumes in TorchX's notation; all nodes must see the folder that job.dump_folder names
        env: environment variables, such as HF_HOME=/outputs/hub,HF_HUB_OFFLINE=1
        max_retries: how often the whole job is started again after a failure
        max_restarts: how often torchrun starts failed processes again on the nodes that are there
        port: where the first node listens for the others
    """
    processes = gpus_per_node or 2
    meeting_point = f'"$${{{specs.macros.rank0_env}:-localhost}}:{port}"'  # a variable that the scheduler sets
    command = shlex.join([f"{checkout}/scripts/train.sh", config, *arguments])
    return specs.AppDef(
        name="transformers-trainer",
        roles=[
            specs.Role(
                name="trainer",  # goes into the name of the variable above: letters only
                image=image,
                entrypoint="bash",
                args=["-c", f"RDZV_ENDPOINT={meeting_point} exec {command}"],
                env={
                    "NNODES": str(nodes),
                    "NPROC": str(processes),
                    "RDZV_ID": specs.macros.app_id,
                    "MAX_RESTARTS": str(max_restarts),
                    **(env or {}),
                },
                num_replicas=nodes,
                max_retries=max_retries,
                retry_policy=specs.RetryPolicy.APPLICATION,  # the others cannot go on without a node
                resource=specs.Resource(
                    cpu=cpus_per_gpu * processes, gpu=gpus_per_node, memMB=memory_gib_per_gpu * 1024 * processes
                ),
                port_map={"rendezvous": port},
                mounts=specs.parse_mounts(mounts) if mounts else [],
            )
        ],
    )
