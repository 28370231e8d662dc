"""Prints, as JSON, the collectives that XLA's partitioner puts into the steps of all ``jit`` modes.

It runs in its own process, because XLA reads where to write its programs when it starts. The partitioner is the
same for all platforms; only afterwards do backends rewrite what it made (the CPU's sums 16 bits in float32).
"""

import json
import os
import pathlib
import re
import sys

OPCODES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
PATTERN = re.compile(rf"= \(?(\w+)\[([\d,]*)\]\S* ({OPCODES})\(")


def collectives(lowered, folder):
    """Compiles a program and reads what the partitioner made of it: names, dtypes and shapes."""
    before = set(folder.rglob("*after_spmd-partitioning*"))
    lowered.compile()
    [written] = [path for path in folder.rglob("*jit_step*after_spmd-partitioning*") if path not in before]
    return [(name, dtype, shape) for dtype, shape, name in PATTERN.findall(written.read_text())]


def main(folder):
    """Goes through modes and dtypes of sums."""
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=spmd-partitioning"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_num_cpu_devices", 8)
    import jmp_lite as jmp
    from jmp_lite.products import _matmul
    from support.spread import MODES, Training, batch, parameters, scaled

    _matmul._product_on_cpu = _matmul._product  # that of other platforms, compiled but never run
    rng, found = np.random.default_rng(0), {}
    for mode in MODES:
        for reduce in ("float32", "bfloat16"):
            if not mode.is_local:
                policy = jmp.Policy(jnp.float32, jnp.bfloat16, jnp.float32, reduce_dtype=reduce)
                training = Training(mode, policy, scaled(), parameters(rng))
                found[f"{mode}, {reduce}"] = collectives(training.lowered(*batch(rng)), folder)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
