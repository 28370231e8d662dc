"""Every exception and warning of the library.

::

    JmpLiteError
    ├── UnknownDtypeError         ValueError      a dtype or policy string that cannot be parsed
    ├── InvalidPolicyError        TypeError       a dtype that is not floating, or two policies for the same path
    ├── InvalidPatternError       ValueError      a pattern that is not a regular expression
    ├── InvalidLossScaleError     ValueError      a loss scale or one of its settings is out of range, or traced
    ├── InvalidSelectionError     TypeError       a verdict that is not one boolean, or trees that do not match
    ├── InvalidFunctionError      TypeError       not a pure function of arrays, or one that returns no loss
    ├── InvalidMicrobatchError    ValueError      a batch that cannot be split into microbatches
    ├── InvalidStepError          TypeError       not an optimizer, or gradients of other parameters
    ├── MissingAxisError          ValueError      devices that could disagree on skipping a step
    ├── ReplicasDisagreeError     RuntimeError    pmap replicas that decided differently
    ├── LossScaleNotFoundError    ValueError      no loss scale in the state, or several and no name
    ├── LossScaleStalledError     RuntimeError    every step is skipped at the lowest scale
    ├── PolicyMismatchError       ValueError      a checkpoint or artifact with another policy or recipe
    ├── CheckpointMismatchError   ValueError      a state and a checkpoint that do not match
    ├── CheckpointNotFoundError   FileNotFoundError  the requested checkpoint does not exist
    ├── CorruptCheckpointError    RuntimeError    a damaged checkpoint, without a good one before it
    ├── ForeignCheckpointError    ValueError      a checkpoint that jmp_lite did not write
    ├── InvalidCheckpointError    ValueError      a step, a setting or a leaf that is not valid
    ├── CheckpointLockedError     RuntimeError    another job is writing to the directory
    ├── InvalidExportError        ValueError      a function or parameters that cannot be frozen
    ├── CorruptArtifactError      ValueError      not an artifact, a damaged one, or not the pinned one
    ├── PlatformMismatchError     RuntimeError    an artifact that this process cannot run
    ├── InvalidShardingError      ValueError      shardings that cannot be gathered
    ├── ClusterError              RuntimeError    the processes of a job cannot connect
    ├── InvalidRecipeError        ValueError      a format or a recipe that does not exist
    ├── InvalidPruningError       ValueError      invalid settings of prune
    ├── InvalidStorageError       ValueError      a storage format that does not fit the parameters or the state
    ├── SecondDerivativeError     NotImplementedError  a second derivative of quantized matmuls
    ├── InvalidOpError            TypeError       an invalid class or replacement for a primitive
    ├── InvalidRuleError          ValueError      an invalid rule or setting of autocast
    ├── InvalidAnalysisError      ValueError      an unknown device or format, or too little data
    └── ComputeDtypeError         AssertionError  matmuls in a wider dtype than asserted
    NonFiniteUpdateWarning        UserWarning     finite gradients, but NaN or infinity in the updates
    SlowDtypeWarning              UserWarning     a compute dtype that this accelerator runs slowly
    UnmatchedRuleWarning          UserWarning     a rule, PolicyMap key, op or recipe that changes nothing
    LostUpdatesWarning            UserWarning     16-bit parameters that lose small updates
    UncompressedStateWarning      UserWarning     optimizer state that stays in float32
    LeftDenseWarning              UserWarning     a weight that prune leaves dense
    CorruptCheckpointWarning      UserWarning     a damaged checkpoint that was skipped

To add one: name it ``<problem>Error``, make a builtin that users already catch the second base, show code that fails
and code that works in the docstring, and write a message that quotes the input and says what to do.
"""


class JmpLiteError(Exception):
    """Base of every exception raised by jmp_lite.

    Example:
        >>> issubclass(jmp.errors.InvalidPolicyError, jmp.errors.JmpLiteError)
        True
    """


class UnknownDtypeError(JmpLiteError, ValueError):
    """A dtype name or policy string cannot be parsed.

    Example:
        >>> jmp.get_policy("compute_float16")
        Traceback (most recent call last):
        jmp_lite.errors.UnknownDtypeError: Unknown dtype 'compute_float16' in policy 'compute_float16'...
        >>> str(jmp.get_policy("compute=float16"))
        'p=full,c=f16,o=f16'
    """


class InvalidPolicyError(JmpLiteError, TypeError, ValueError):
    """A policy with a dtype that is not floating-point, or a map with two policies for one path.

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
    """A pattern of a ``PolicyMap`` or ``Rule`` is not a regular expression, or takes too long to search.

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
    """A verdict is not a single boolean, or two trees differ in a leaf that cannot be selected.

    Example:
        >>> jmp.select_tree(jnp.array([True, False]), 1.0, 2.0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidSelectionError: expected boolean scalar, got bool[2]...
        >>> jmp.select_tree(True, {"name": "a"}, {"name": "b"})
        Traceback (most recent call last):
        jmp_lite.errors.InvalidSelectionError: Leaf 'name' is 'a' in one tree and 'b' in the other...
    """


class InvalidFunctionError(JmpLiteError, TypeError):
    """Not a pure function of arrays, invalid arguments for one, or a result that is not a real scalar.

    Fails and works::

        >>> jmp.autocast(jnp.ones(2), "mixed_bfloat16")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidFunctionError: autocast takes a function, got float32[2].
        >>> double = jmp.autocast(lambda x: 2 * x, "mixed_bfloat16")
        >>> jmp.scaled_value_and_grad(lambda w: 3, loss_scale=jmp.NoOpLossScale())(1.0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidFunctionError: The loss must be a real floating-point scalar, got int32[]...
    """


class InvalidMicrobatchError(JmpLiteError, ValueError):
    """A batch cannot be split into the requested number of microbatches.

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
    """The arguments of a training step do not match: not an optimizer, or gradients of other parameters.

    Example:
        >>> jmp.loss_scaled(optax.adam)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidStepError: loss_scaled takes an Optax optimizer, got the function adam; call it, ...
        >>> tx = jmp.loss_scaled(optax.adam(1e-3))
    """


class MissingAxisError(JmpLiteError, ValueError):
    """Devices see different gradients, and no ``axis_name``, or one of an unmapped axis, says where they must agree.

    Fails and works::

        jax.shard_map(step_with(jmp.loss_scaled(optax.sgd(0.1))), ...)
        # jmp_lite.errors.MissingAxisError: Devices along 'data' see different gradients, and could decide differently
        # whether to skip a step. Write loss_scaled(inner, axis_name='data').
        jax.shard_map(step_with(jmp.loss_scaled(optax.sgd(0.1), axis_name="data")), ...)
    """


class ReplicasDisagreeError(JmpLiteError, RuntimeError):
    """``pmap`` replicas of the same model decided differently.

    Fails and works::

        jax.pmap(step_with(jmp.loss_scaled(optax.sgd(0.1))), "data")
        # jmp_lite.errors.ReplicasDisagreeError: The replicas disagree: notfinite_count is [0, 1]...
        jax.pmap(step_with(jmp.loss_scaled(optax.sgd(0.1), axis_name="data")), "data")
    """


class LossScaleNotFoundError(JmpLiteError, ValueError):
    """A state holds no loss scale, or several and no name was given.

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
    """Every step is skipped, and the loss scale cannot go lower.

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
    """A checkpoint or artifact was written under another policy or recipe.

    Example:
        >>> from jmp_lite import checkpoint
        >>> data = checkpoint.to_bytes({"w": jnp.ones(2)}, policy="mixed_float16")
        >>> checkpoint.from_bytes({"w": jnp.ones(2)}, data, policy="mixed_bfloat16")
        Traceback (most recent call last):
        jmp_lite.errors.PolicyMismatchError: The checkpoint was written under policy 'p=full,c=f16,o=full'...
    """


class CheckpointMismatchError(JmpLiteError, ValueError):
    """A state and a checkpoint do not match: they differ in structure, shapes or dtypes, or come from different runs.

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
    """The requested checkpoint does not exist.

    Example:
        >>> jmp.checkpoint.restore("no_such_run", {"w": jnp.zeros(2)}, policy="full")
        Traceback (most recent call last):
        jmp_lite.errors.CheckpointNotFoundError: There is no checkpoint in ...no_such_run...
    """


class CorruptCheckpointError(JmpLiteError, RuntimeError):
    """A checkpoint is damaged, and no good one is left to fall back to.

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
    """A checkpoint lacks the header of this library: Orbax or Flax wrote it without jmp_lite.

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
    """A step, a setting or a leaf is not valid for a checkpoint.

    Example:
        >>> import tempfile
        >>> jmp.checkpoint.CheckpointManager(tempfile.mkdtemp(), policy="full", max_to_keep=0)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidCheckpointError: max_to_keep must be an int >= 1, or None to keep all; got 0...
    """


class CheckpointLockedError(JmpLiteError, RuntimeError):
    """Another job, or another manager in this job, is writing to the directory.

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
    """A file is not an artifact, was changed after it was written, or does not match the pinned digest.

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
    """This process cannot run an artifact: it was made for other devices or another JAX, or it needs float64.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> _ = jmp.export.freeze(lambda w, x: w * x, jnp.ones(2), jnp.ones(2), path=path, platforms=["tpu"])
        >>> jmp.export.load(path)
        Traceback (most recent call last):
        jmp_lite.errors.PlatformMismatchError: '...model.safetensors' was frozen for tpu, but this process runs on ...
    """


class ClusterError(JmpLiteError, RuntimeError):
    """The processes of a job cannot connect, or a process got invalid arguments.

    Example:
        >>> jmp.distributed.initialize("10.0.0.1:1234", num_processes=2)
        Traceback (most recent call last):
        jmp_lite.errors.ClusterError: coordinator_address='10.0.0.1:1234', num_processes=2 given without process_id...
        >>> jmp.distributed.initialize("10.0.0.1:1234", num_processes=2, process_id=1)  # doctest: +SKIP
        True
    """


class InvalidShardingError(JmpLiteError, ValueError):
    """Not a sharding of these parameters, or one that cannot be gathered.

    Example:
        >>> jmp.distributed.gather_params({"w": jnp.ones(8)}, "data", "mixed_bfloat16")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidShardingError: A sharding must be a NamedSharding, a PartitionSpec or None, got...
        >>> jmp.distributed.gather_params({"w": jnp.ones(8)}, jax.P(), "mixed_bfloat16")["w"].shape
        (8,)
    """


class InvalidRecipeError(JmpLiteError, ValueError):
    """A quantization format, granularity or combination that does not exist.

    Example:
        >>> jmp.quant.QuantSpec(jnp.int4)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidRecipeError: int4 has too few numbers for one scale per tensor: write ...
    """


class InvalidPruningError(JmpLiteError, ValueError):
    """Settings of ``prune`` are invalid, or do not fit the weights.

    Example:
        >>> jmp.optim.prune(80)
        Traceback (most recent call last):
        jmp_lite.errors.InvalidPruningError: sparsity must be in [0, 1) or a schedule, got 80...
    """


class InvalidStorageError(JmpLiteError, ValueError):
    """A storage format does not exist, or cannot hold these parameters or this optimizer state.

    Example:
        >>> jmp.optim.stored(optax.adam(1e-3), params="splt8")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidStorageError: params='splt8' is not a format of parameters. Did you mean 'split8'? ...
    """


class SecondDerivativeError(JmpLiteError, NotImplementedError):
    """Quantized matmuls have first derivatives only: the straight-through derivative of rounding has no second.

    Example:
        >>> jax.hessian(lambda x: jmp.quant.FP8(x, x, (((0,), (0,)), ((), ()))))(jnp.ones(2))
        Traceback (most recent call last):
        jmp_lite.errors.SecondDerivativeError: A matmul with an operand in e4m3:pow2 was differentiated twice...
    """


class InvalidOpError(JmpLiteError, TypeError):
    """The entry for a primitive is neither an operation class nor a function.

    Example:
        >>> jmp.register_op("exp", "float32")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidOpError: 'float32' cannot stand for primitive 'exp'...
        >>> jmp.autocast(jnp.exp, "mixed_bfloat16", ops={"exp": jmp.OpClass.DENY})(jnp.zeros(())).dtype
        dtype('float32')
    """


class InvalidRuleError(JmpLiteError, ValueError):
    """A rule or a setting of autocast is invalid.

    Example:
        >>> jmp.Rule("head", precision="fast")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidRuleError: precision must be 'auto', 'full', 'low', or stand for float32 or ...
        >>> jmp.Rule("head", precision="full").precision
        'full'
    """


class InvalidAnalysisError(JmpLiteError, ValueError):
    """A device, format or setting of an analysis does not exist, or there is too little to analyze.

    Example:
        >>> jmp.analysis.estimate(jnp.sum, device="h10")
        Traceback (most recent call last):
        jmp_lite.errors.InvalidAnalysisError: Unknown device 'h10'. Did you mean 'h100'?...
    """


class ComputeDtypeError(JmpLiteError, AssertionError):
    """A matmul, convolution or kernel has wider operands than asserted.

    Example:
        >>> check = jmp.analysis.assert_compute_dtype(jnp.matmul, "bfloat16")
        >>> check(jnp.ones((8, 8)), jnp.ones((8, 8)))
        Traceback (most recent call last):
        jmp_lite.errors.ComputeDtypeError: 1 of 1 matmuls and kernels has operands wider than bfloat16...
        >>> check(jnp.ones((8, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.bfloat16))
    """


class SlowDtypeWarning(UserWarning):
    """The accelerator runs the compute dtype slowly; the message names a better choice.

    Example:
        >>> issubclass(jmp.errors.SlowDtypeWarning, UserWarning)
        True
    """


class NonFiniteUpdateWarning(UserWarning):
    """An optimizer returned NaN or infinite updates for finite gradients; those updates were dropped.

    Example:
        >>> issubclass(jmp.errors.NonFiniteUpdateWarning, UserWarning)
        True
    """


class UnmatchedRuleWarning(UserWarning):
    """A rule, ``PolicyMap`` key, op or recipe changes nothing in a program or tree; the message says what is there.

    Example:
        >>> issubclass(jmp.errors.UnmatchedRuleWarning, UserWarning)
        True
    """


class LostUpdatesWarning(UserWarning):
    """16-bit parameters are rounded to nearest at each step, which loses updates below half a unit in the last place.

    Example:
        >>> issubclass(jmp.errors.LostUpdatesWarning, UserWarning)
        True
    """


class UncompressedStateWarning(UserWarning):
    """Optimizer state that ``stored`` does not recognize stays in float32; the message names it.

    Example:
        >>> issubclass(jmp.errors.UncompressedStateWarning, UserWarning)
        True
    """


class LeftDenseWarning(UserWarning):
    """A weight is not pruned in groups, because its contracted axes are unknown; the message names it.

    Example:
        >>> issubclass(jmp.errors.LeftDenseWarning, UserWarning)
        True
    """


class CorruptCheckpointWarning(UserWarning):
    """A checkpoint is damaged or incomplete; the run resumes from the last good one before it.

    Example:
        >>> issubclass(jmp.errors.CorruptCheckpointWarning, UserWarning)
        True
    """
