"""Encodes a checkpoint on a Ray cluster, one task for each shard.

  python examples/encode_on_ray.py CHECKPOINT FOLDER

All machines see the checkpoint and the folder. The folder appears when all shards are
whole. If the cluster stops, the same command finds the shards that were written.
"""

import sys
from typing import Any

import ray

import rotbits_jax


@ray.remote
def encode_shard(index: int, *paths: str, **options: Any) -> None:
  """Encodes one shard; every task makes the same plan."""
  rotbits_jax.plan_shards(*paths, **options).encode(index)


def encode(*paths: str, shard_size: int = 2 * 10**9, **options: Any) -> None:
  """Encodes a checkpoint to a folder of shards; see `rotbits_jax.encode_to_file`."""
  options['shard_size'] = shard_size
  plan = rotbits_jax.plan_shards(*paths, **options)
  ray.get([encode_shard.remote(i, *paths, **options) for i in range(len(plan))])
  plan.publish()


if __name__ == '__main__':
  encode(*sys.argv[1:3])
