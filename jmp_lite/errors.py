"""Every exception and warning of the library.

::

    JmpLiteError
    ├── UnknownDtypeError         ValueError      a dtype or policy string nobody can parse
    ├── InvalidPolicyError        TypeError       a policy of what is not a floating dtype, or two for the same path
    ├── InvalidPatternError       ValueError      a pattern that no path can be searched for
    ├── InvalidLossScaleError     ValueError      a loss scale or one of its settings is out of range, or traced
    ├── InvalidSelectionError     TypeError       a verdict that is not one boolean, or trees that are not alike
    ├── InvalidFunctionError      TypeError       no pure function of arrays, or one that returns no loss
    ├── InvalidMicrobatchError    ValueError      a batch that cannot be split as asked
    ├── InvalidStepError          TypeError       no optimizer, or gradients of other parameters
    ├── MissingAxisError          ValueError      devices that could decide differently whether to skip a step
    ├── ReplicasDisagreeError     RuntimeError    replicas of pmap that took different decisions
    ├── LossScaleNotFoundError    ValueError      no loss scale in the state, or several and no name
    ├── LossScaleStalledError     RuntimeError    nothing but skipped steps at the lowest scale
    ├── PolicyMismatchError       ValueError      a checkpoint or artifact made under another policy or recipe
    ├── CheckpointMismatchError   ValueError      a state and a checkpoint that do not belong together
    ├── CheckpointNotFoundError   FileNotFoundError  no checkpoint where one was asked for
    ├── CorruptCheckpointError    RuntimeError    a checkpoint that is damaged, and no good one before it
    ├── ForeignCheckpointError    ValueError      a checkpoint that another program wrote
    ├── InvalidCheckpointError    ValueError      a step, a setting or a leaf that no checkpoint can have
    ├── CheckpointLockedError     RuntimeError    a directory that another job writes its checkpoints to
    ├── InvalidExportError        ValueError      something that cannot be frozen into an artifact
    ├── CorruptArtifactError      ValueError      a file that is not an artifact, a damaged one, or not the one meant
    ├── PlatformMismatchError     RuntimeError    an artifact that this process cannot run
    ├── InvalidShardingError      ValueError      shardings that cannot be gathered from
    ├── ClusterError              RuntimeError    the processes of a job do not find each other
    ├── InvalidRecipeError        ValueError      a way to quantize that does not exist
    ├── InvalidPruningError       ValueError      a way to prune that does not exist
    ├── InvalidStorageError       ValueError      parameters or state that cannot be kept as asked
    ├── SecondDerivativeError     NotImplementedError  a second derivative through quantized matmuls
    ├── InvalidOpError            TypeError       something that cannot stand for a primitive in autocast
    ├── InvalidRuleError          ValueError      a rule or a setting of autocast that means nothing
    ├── InvalidAnalysisError      ValueError      an analysis of something that does not exist, or with too little
    └── ComputeDtypeError         AssertionError  matmuls in a wider dtype than asserted
    NonFiniteUpdateWarning        UserWarning     an optimizer made infinities of finite gradients
    SlowDtypeWarning              UserWarning     a format that this accelerator cannot run fast
    UnmatchedRuleWarning          UserWarning     a rule or a key of a PolicyMap that matches nothing
    LostUpdatesWarning            UserWarning     parameters of 16 bits that small updates will not change
    UncompressedStateWarning      UserWarning     state of an optimizer that stays in float32
    CorruptCheckpointWarning      UserWarning     a damaged checkpoint that was passed over

Rule for a new one: ``<what is wrong>Error``, a builtin that users already catch as second base, a docstring with code
that fails and code that works, and a message that quotes the input and says what to do.
"""


class JmpLiteError(Exception):
    """Base of every exception raised by jmp_lite.

    Example:
        >>> issubclass(jmp.errors.InvalidPolicyError, jmp.errors.JmpLiteError)
        True
    """


class UnknownDtypeError(JmpLiteError, ValueError):
    """A dtype name or policy string that cannot be parsed.

    Example:
        >>> jmp.get_policy("compute_float16")
        Traceback (most recent call last):
        jmp_lite.errors.UnknownDtypeError: Unknown dtype 'compute_float16' in policy 'compute_float16'...
        >>> str(jmp.get_policy("compute=float16"))
        'p=full,c=f16,o=f16'
    """


class InvalidPolicyError(JmpLiteError, TypeError, ValueError):
    """A policy built from something that is not a floating-point dtype, or a map with two policies for one path.

    Example:
        >>> jmp.Policy(jnp.int32, jnp.float16, jnp.float32)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidPolicyError: param_dtype must be a floating-point dtype, got int32...
        >>> str(jmp.Policy(jnp.float32, jnp.float16, jnp.float32))
        'p=full,c=f16,o=full'
        >>> jmp.PolicyMap({"layer_.*": "bf16", ".*_norm": "f32"}, "mixed_bfloat16").policy_for("layer_norm")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidPolicyError: Path 'layer_norm' matches '.*_norm' (p=full,c=full,o=full) and ...
    """


class InvalidPatternError(JmpLiteError, ValueError):
    """A pattern of a ``PolicyMap`` or ``Rule`` that is not a regular expression, or that no path can be searched for.

    Example:
        >>> jmp.PolicyMap({"head(": "full"}, default="mixed_bfloat16")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidPatternError: Pattern 'head(' is not a regular expression: missing ), unterminated ...
        >>> print(jmp.PolicyMap({"(?i)HEAD": "full"}, default="mixed_bfloat16").policy_for("head"))
        p=full,c=full,o=full
    """


class InvalidLossScaleError(JmpLiteError, ValueError, TypeError):
    """A loss scale, or one of its settings, is out of range, or is known only at run time.

    Example:
        >>> jmp.DynamicLossScale(0.0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidLossScaleError: loss_scale must be positive and finite, got 0.0...
        >>> jax.jit(lambda scale: jmp.StaticLossScale(scale).scale(1.0))(8.0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidLossScaleError: StaticLossScale needs a Python number, got a traced value...
    """


class InvalidSelectionError(JmpLiteError, TypeError, ValueError, AssertionError):
    """A verdict is not a single boolean, or two trees differ in a leaf that no array operation can choose between.

    Example:
        >>> jmp.select_tree(jnp.array([True, False]), 1.0, 2.0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidSelectionError: expected boolean scalar, got bool[2]...
        >>> jmp.select_tree(True, {"name": "a"}, {"name": "b"})
        Traceback (most recent call last):
        jmp_lite.errors.InvalidSelectionError: Leaf 'name' is 'a' in one tree and 'b' in the other...
    """


class InvalidFunctionError(JmpLiteError, TypeError):
    """Not a pure function of arrays, or one called with what none can take, or one that returned no real scalar.

    Fails and works::

        >>> jmp.autocast(jnp.ones(2), "mixed_bfloat16")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidFunctionError: autocast takes a function, got Array([1., 1.], dtype=float32).
        >>> double = jmp.autocast(lambda x: 2 * x, "mixed_bfloat16")
        >>> jmp.scaled_value_and_grad(lambda w: 3, loss_scale=jmp.NoOpLossScale())(1.0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidFunctionError: The loss must be a real floating-point scalar, got int32[]...
    """


class InvalidMicrobatchError(JmpLiteError, ValueError):
    """A batch cannot be split into the microbatches asked for.

    Example:
        >>> def loss_fn(w, x):
        ...     return jnp.mean(w * x)
        >>> jmp.accumulate_gradients(loss_fn, 4, loss_scale=jmp.NoOpLossScale())(1.0, jnp.ones(6))
        Traceback (most recent call last):
        jmp_lite.errors.InvalidMicrobatchError: Argument 1 is float32[6]: 6 rows do not divide into num...
        >>> loss, _ = jmp.accumulate_gradients(loss_fn, 3, loss_scale=jmp.NoOpLossScale())(1.0, jnp.ones(6))
        >>> print(loss)
        1.0
    """


class InvalidStepError(JmpLiteError, TypeError, ValueError):
    """What a training step was given does not belong together: no optimizer, or gradients of other parameters.

    Example:
        >>> jmp.loss_scaled(optax.adam)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidStepError: loss_scaled takes an Optax optimizer, got the function adam; call it, ...
        >>> tx = jmp.loss_scaled(optax.adam(1e-3))
    """


class MissingAxisError(JmpLiteError, ValueError):
    """Devices see different gradients, and nothing says over which axis they are to agree.

    Fails and works::

        jax.shard_map(step_with(jmp.loss_scaled(optax.sgd(0.1))), ...)
        # jmp_lite.errors.MissingAxisError: Devices along 'data' see different gradients, and could decide differently
        # whether to skip a step. Write loss_scaled(inner, axis_name='data').
        jax.shard_map(step_with(jmp.loss_scaled(optax.sgd(0.1), axis_name="data")), ...)
    """


class ReplicasDisagreeError(JmpLiteError, RuntimeError):
    """Replicas of ``pmap`` that train the same model have taken different decisions.

    Fails and works::

        jax.pmap(step_with(jmp.loss_scaled(optax.sgd(0.1))), "data")
        # jmp_lite.errors.ReplicasDisagreeError: The replicas disagree: notfinite_count is [0, 1]...
        jax.pmap(step_with(jmp.loss_scaled(optax.sgd(0.1), axis_name="data")), "data")
    """


class LossScaleNotFoundError(JmpLiteError, ValueError):
    """A state that should hold a loss scale holds none, or several and none was asked for by name.

    Example:
        >>> jmp.metrics(optax.adam(1e-3).init({"w": jnp.ones(2)}))
        Traceback (most recent call last):
        jmp_lite.errors.LossScaleNotFoundError: No loss scale in the state...
        >>> state = {"a": jmp.DynamicLossScale(), "b": jmp.DynamicLossScale()}
        >>> jmp.scaled_value_and_grad(jnp.sum, loss_scale=state)(jnp.ones(2))
        Traceback (most recent call last):
        jmp_lite.errors.LossScaleNotFoundError: 2 loss scales in the state: 'a', 'b'...
        >>> loss, grads = jmp.scaled_value_and_grad(jnp.sum, loss_scale=state, name="a")(jnp.ones(2))
        >>> print(loss)
        2.0
    """


class LossScaleStalledError(JmpLiteError, RuntimeError):
    """Step after step is skipped and the loss scale cannot go lower.

    Example:
        >>> tx = jmp.loss_scaled(optax.sgd(0.1), jmp.DynamicLossScale(1.0))
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     _, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, state, params)
        >>> jmp.check_loss_scale(state, max_skips=3)
        Traceback (most recent call last):
        jmp_lite.errors.LossScaleStalledError: 3 steps in a row were skipped...
    """


class PolicyMismatchError(JmpLiteError, ValueError):
    """A checkpoint was written under a policy other than the one it is restored with.

    Example:
        >>> from jmp_lite import checkpoint
        >>> data = checkpoint.to_bytes({"w": jnp.ones(2)}, policy="mixed_float16")
        >>> checkpoint.from_bytes({"w": jnp.ones(2)}, data, policy="mixed_bfloat16")
        Traceback (most recent call last):
        jmp_lite.errors.PolicyMismatchError: The checkpoint was written under policy 'p=full,c=f16,o=full'...
    """


class CheckpointMismatchError(JmpLiteError, ValueError):
    """A state and a checkpoint do not belong together: they differ in structure, shapes, dtypes, or in the run.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/step_1"
        >>> jmp.checkpoint.save(path, {"w": jnp.ones(2)}, policy="full")
        >>> jmp.checkpoint.restore(path, {"w": jnp.zeros(3)}, policy="full")
        Traceback (most recent call last):
        jmp_lite.errors.CheckpointMismatchError: Checkpoint and template differ: 'w' is float32[2] in the checkpoint...
        >>> jmp.checkpoint.restore(path, {"w": jnp.zeros(2)}, policy="full")
        {'w': Array([1., 1.], dtype=float32)}
    """


class CheckpointNotFoundError(JmpLiteError, FileNotFoundError):
    """There is no checkpoint where one was asked for.

    Example:
        >>> jmp.checkpoint.restore("no_such_run", {"w": jnp.zeros(2)}, policy="full")
        Traceback (most recent call last):
        jmp_lite.errors.CheckpointNotFoundError: There is no checkpoint in ...no_such_run...
    """


class CorruptCheckpointError(JmpLiteError, RuntimeError):
    """A checkpoint is damaged, and there is no good one to fall back to.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "step_1")
        >>> jmp.checkpoint.save(path, {"w": jnp.ones(2)}, policy="full")
        >>> _ = (path / "header" / "metadata").write_text("{}")
        >>> jmp.checkpoint.restore(path, {"w": jnp.zeros(2)}, policy="full")
        Traceback (most recent call last):
        jmp_lite.errors.CorruptCheckpointError: The checkpoint in ...step_1 is damaged...
    """


class ForeignCheckpointError(JmpLiteError, ValueError):
    """A checkpoint without the header of this library: Orbax or Flax wrote it by themselves.

    Example:
        >>> from flax import serialization
        >>> data = serialization.to_bytes({"w": jnp.ones(2)})
        >>> jmp.checkpoint.from_bytes({"w": jnp.zeros(2)}, data, policy="full")
        Traceback (most recent call last):
        jmp_lite.errors.ForeignCheckpointError: These bytes have no header of jmp_lite...
        >>> serialization.from_bytes({"w": jnp.zeros(2)}, data)["w"]
        array([1., 1.], dtype=float32)
    """


class InvalidCheckpointError(JmpLiteError, ValueError):
    """A step, a setting or a leaf that no checkpoint can have.

    Example:
        >>> import tempfile
        >>> jmp.checkpoint.CheckpointManager(tempfile.mkdtemp(), policy="full", max_to_keep=0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidCheckpointError: max_to_keep must be an int >= 1, or None to keep all; got 0...
    """


class CheckpointLockedError(JmpLiteError, RuntimeError):
    """Another job, or another manager of this one, writes its checkpoints to the directory.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> first, second = (jmp.checkpoint.CheckpointManager(directory, policy="full") for _ in range(2))
        >>> first.save(1, {"w": jnp.ones(2)})
        True
        >>> second.save(2, {"w": jnp.ones(2)})
        Traceback (most recent call last):
        jmp_lite.errors.CheckpointLockedError: Process ... writes checkpoints to ...
        >>> first.close()
        >>> second.save(2, {"w": jnp.ones(2)})
        True
        >>> second.close()
    """


class InvalidExportError(JmpLiteError, ValueError):
    """A function, its parameters or a setting cannot be frozen into an artifact.

    Example:
        >>> jmp.export.freeze(jnp.dot, jax.random.key(0), path="model.safetensors")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidExportError: Leaf '' is key<fry>[], which no safetensors file can hold...
    """


class CorruptArtifactError(JmpLiteError, ValueError):
    """A file is not an artifact, was changed after it was written, or is another one than the caller pinned.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> digest = jmp.export.freeze(lambda w, x: w * x, jnp.ones(2), jnp.ones(2), path=path)
        >>> print(jmp.export.load(path, digest=digest)(jnp.ones(2)))
        [1. 1.]
        >>> _ = path.write_bytes(path.read_bytes()[:-1])
        >>> jmp.export.load(path)
        Traceback (most recent call last):
        jmp_lite.errors.CorruptArtifactError: '...model.safetensors' was changed after it was written...
    """


class PlatformMismatchError(JmpLiteError, RuntimeError):
    """An artifact cannot be run by this process: it was made for other devices, another JAX, or needs float64.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> _ = jmp.export.freeze(lambda w, x: w * x, jnp.ones(2), jnp.ones(2), path=path, platforms=["tpu"])
        >>> jmp.export.load(path)
        Traceback (most recent call last):
        jmp_lite.errors.PlatformMismatchError: '...model.safetensors' was frozen for tpu, but this process runs on ...
    """


class ClusterError(JmpLiteError, RuntimeError):
    """The processes of a job do not find each other, or a process was told something that cannot be.

    Example:
        >>> jmp.distributed.initialize("10.0.0.1:1234", num_processes=2)
        Traceback (most recent call last):
        jmp_lite.errors.ClusterError: coordinator_address='10.0.0.1:1234', num_processes=2 given without process_id...
        >>> jmp.distributed.initialize("10.0.0.1:1234", num_processes=2, process_id=1)  # doctest: +SKIP
        True
    """


class InvalidShardingError(JmpLiteError, ValueError):
    """Something that is not a sharding of these parameters, or one that cannot be gathered from.

    Example:
        >>> jmp.distributed.gather_params({"w": jnp.ones(8)}, "data", "mixed_bfloat16")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidShardingError: A sharding must be a NamedSharding, a PartitionSpec or None, got...
        >>> jmp.distributed.gather_params({"w": jnp.ones(8)}, jax.P(), "mixed_bfloat16")["w"].shape
        (8,)
    """


class InvalidRecipeError(JmpLiteError, ValueError):
    """A format, a granularity or a combination of these that nothing can be quantized with.

    Example:
        >>> jmp.quant.QuantSpec(jnp.int4)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidRecipeError: int4 has too few numbers for one scale per tensor: write ...
    """


class InvalidPruningError(JmpLiteError, ValueError):
    """Settings of ``prune`` that mean nothing, or weights that cannot be pruned as asked.

    Example:
        >>> jmp.optim.prune(80)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidPruningError: sparsity must be in [0, 1) or a schedule, got 80...
    """


class InvalidStorageError(JmpLiteError, ValueError):
    """A format of parameters or optimizer state that does not exist, or that cannot hold what it is asked to.

    Example:
        >>> jmp.optim.stored(optax.adam(1e-3), params="splt8")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidStorageError: params='splt8' is not a format of parameters. Did you mean 'split8'? ...
    """


class SecondDerivativeError(JmpLiteError, NotImplementedError):
    """Quantized matmuls have first derivatives only: rounding has no derivative, and a stand-in for it no second.

    Example:
        >>> jax.hessian(lambda x: jmp.quant.FP8(x, x, (((0,), (0,)), ((), ()))))(jnp.ones(2))
        Traceback (most recent call last):
        jmp_lite.errors.SecondDerivativeError: A matmul with an operand in e4m3:pow2 was differentiated twice...
    """


class InvalidOpError(JmpLiteError, TypeError):
    """Something that is neither a class of operations nor a function was given for a primitive.

    Example:
        >>> jmp.register_op("exp", "float32")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidOpError: 'float32' cannot stand for primitive 'exp'...
        >>> jmp.autocast(jnp.exp, "mixed_bfloat16", ops={"exp": jmp.OpClass.DENY})(jnp.zeros(())).dtype
        dtype('float32')
    """


class InvalidRuleError(JmpLiteError, ValueError):
    """A rule or a setting of autocast that means nothing.

    Example:
        >>> jmp.Rule("head", precision="fast")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidRuleError: precision must be 'auto', 'full', 'low', or stand for float32 or ...
        >>> jmp.Rule("head", precision="full").precision
        'full'
    """


class InvalidAnalysisError(JmpLiteError, ValueError):
    """A device, a format or a setting of an analysis that does not exist, or too little to analyze.

    Example:
        >>> jmp.analysis.estimate(jnp.sum, device="h10")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidAnalysisError: Unknown device 'h10'. Did you mean 'h100'?...
    """


class ComputeDtypeError(JmpLiteError, AssertionError):
    """A matmul, a convolution or a kernel has wider operands than was asserted.

    Example:
        >>> check = jmp.analysis.assert_compute_dtype(jnp.matmul, "bfloat16")
        >>> check(jnp.ones((8, 8)), jnp.ones((8, 8)))
        Traceback (most recent call last):
        jmp_lite.errors.ComputeDtypeError: 1 of 1 matmuls and kernels has operands wider than bfloat16...
        >>> check(jnp.ones((8, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.bfloat16))
    """


class SlowDtypeWarning(UserWarning):
    """The accelerator in use cannot run the compute dtype fast; the message names the better choice.

    Example:
        >>> issubclass(jmp.errors.SlowDtypeWarning, UserWarning)
        True
    """


class NonFiniteUpdateWarning(UserWarning):
    """An optimizer made updates that are not finite of gradients that are; they were left out.

    Example:
        >>> issubclass(jmp.errors.NonFiniteUpdateWarning, UserWarning)
        True
    """


class UnmatchedRuleWarning(UserWarning):
    """A rule, or a key of a ``PolicyMap``, matched nothing in a program or tree; the message names what comes nearest.

    Example:
        >>> issubclass(jmp.errors.UnmatchedRuleWarning, UserWarning)
        True
    """


class LostUpdatesWarning(UserWarning):
    """Parameters of 16 bits are rounded to nearest at each step, so that updates below half a unit are lost.

    Example:
        >>> issubclass(jmp.errors.LostUpdatesWarning, UserWarning)
        True
    """


class UncompressedStateWarning(UserWarning):
    """State of an optimizer that ``stored`` does not know stays in float32; the message names it.

    Example:
        >>> issubclass(jmp.errors.UncompressedStateWarning, UserWarning)
        True
    """


class LeftDenseWarning(UserWarning):
    """A weight is not pruned in groups, because nobody said which of its axes matmuls contract; the message names it.

    Example:
        >>> issubclass(jmp.errors.LeftDenseWarning, UserWarning)
        True
    """


class CorruptCheckpointWarning(UserWarning):
    """A checkpoint is damaged or was not written to its end; the run resumes from the last good one before it.

    Example:
        >>> issubclass(jmp.errors.CorruptCheckpointWarning, UserWarning)
        True
    """
