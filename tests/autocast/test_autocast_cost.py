"""What the first step of a process costs: one trace and one compilation, on every version of JAX."""

import subprocess
import sys

import pytest

STEP = """
import jax, jax.numpy as jnp
import jmp_lite as jmp
loss = lambda p, x: jnp.mean(jax.nn.softmax(jnp.tanh(x @ p) @ p) ** 2)
traces, compilations = 0, []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compilations.append(name) if name.endswith("backend_compile_duration") else None
)
{before}
@jax.jit
def step(p, x):
    global traces
    traces += 1
    return p - jax.grad({loss})(p, x)

p, x = jnp.ones((16, 16)), jnp.ones((8, 16))
p.block_until_ready(), x.block_until_ready()
n = len(compilations)
for _ in range(3):
    p = step(p, x)
print(traces, len(compilations) - n)
"""
WAYS = {
    "wrapped before": ("cast = jmp.autocast(loss, 'mixed_bfloat16')", "cast"),
    "wrapped inside": ("", "jmp.autocast(loss, 'mixed_float16')"),
    "residuals low": ("cast = jmp.autocast(loss, 'mixed_bfloat16', residuals='low')", "cast"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_first_step_of_a_process_is_traced_and_compiled_once(way):
    before, loss = WAYS[way]
    program = STEP.format(before=before, loss=loss)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "1"], found.stdout
