"""The tree of exceptions: what each can be caught as, and that none is raised without help."""
# ruff: noqa: SIM300 - the expected value comes first

import inspect
import pickle
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import jmp_lite as jmp
from jmp_lite import analysis, errors, export

BASES = {
    "UnknownDtypeError": ValueError,
    "InvalidPolicyError": TypeError,
    "InvalidPatternError": ValueError,
    "InvalidLossScaleError": ValueError,
    "InvalidSelectionError": TypeError,
    "InvalidFunctionError": TypeError,
    "InvalidMicrobatchError": ValueError,
    "InvalidStepError": TypeError,
    "MissingAxisError": ValueError,
    "ReplicasDisagreeError": RuntimeError,
    "LossScaleNotFoundError": ValueError,
    "LossScaleStalledError": RuntimeError,
    "PolicyMismatchError": ValueError,
    "CheckpointMismatchError": ValueError,
    "CheckpointNotFoundError": FileNotFoundError,
    "CorruptCheckpointError": RuntimeError,
    "CheckpointLockedError": RuntimeError,
    "ForeignCheckpointError": ValueError,
    "InvalidCheckpointError": ValueError,
    "InvalidExportError": ValueError,
    "CorruptArtifactError": ValueError,
    "PlatformMismatchError": RuntimeError,
    "InvalidShardingError": ValueError,
    "ClusterError": RuntimeError,
    "InvalidRecipeError": ValueError,
    "InvalidPruningError": ValueError,
    "InvalidStorageError": ValueError,
    "SecondDerivativeError": NotImplementedError,
    "InvalidOpError": TypeError,
    "InvalidRuleError": ValueError,
    "InvalidAnalysisError": ValueError,
    "ComputeDtypeError": AssertionError,
}
WARNINGS = [
    "SlowDtypeWarning",
    "CorruptCheckpointWarning",
    "UnmatchedRuleWarning",
    "NonFiniteUpdateWarning",
    "LeftDenseWarning",
    "LostUpdatesWarning",
    "UncompressedStateWarning",
]


def defined():
    """Every class of the module, by name."""
    return {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def test_every_error_is_listed():
    """The table of bases and the module agree; the top level has none of them."""
    assert {*BASES, "JmpLiteError", *WARNINGS} == set(defined())
    assert not set(defined()) & set(jmp.__all__)


@pytest.mark.parametrize("name", BASES)
def test_error_is_caught_as_ours_and_as_a_builtin(name):
    """Each error derives from ``JmpLiteError`` and from one builtin, as the docstring of the module says."""
    error = defined()[name]
    assert issubclass(error, jmp.errors.JmpLiteError)
    assert issubclass(error, BASES[name])
    documented = [line.split() for line in errors.__doc__.splitlines() if name in line]
    assert [BASES[name].__name__] == [words[2] for words in documented]


def test_only_the_predicate_error_and_what_asserts_are_assertions():
    """``AssertionError`` is kept for the one place where tests of jmp ask for it, and for a function named so."""
    assertions = [name for name, error in defined().items() if issubclass(error, AssertionError)]
    assert {"InvalidSelectionError", "ComputeDtypeError"} == set(assertions)


@pytest.mark.parametrize("name", WARNINGS)
def test_warning_is_a_user_warning_and_no_error(name):
    """Filters for ``UserWarning`` catch it."""
    assert issubclass(defined()[name], UserWarning)
    assert not issubclass(defined()[name], jmp.errors.JmpLiteError)


@pytest.mark.parametrize("name", [*BASES, "JmpLiteError"])
def test_error_survives_pickling(name):
    """Errors cross process borders with their message."""
    error = pickle.loads(pickle.dumps(defined()[name]("message")))  # noqa: S301
    assert (name, "message") == (type(error).__name__, str(error))


@pytest.mark.parametrize("name", BASES)
def test_error_shows_what_fails(name):
    """The docstring of each error has code that raises it."""
    assert f"jmp_lite.errors.{name}: " in inspect.getdoc(defined()[name])


class Transformed:
    """What Haiku and others return: no function, but one with its functions as attributes."""

    def apply(self, params, x):
        return x


NO_FUNCTIONS = {
    "array": (jnp.ones(2), "got float32[2]."),
    "parameters": ({"w": np.arange(999.0)}, "got {'w': float64[999]}."),
    "None": (None, "got None."),
    "policy string": ("bf16", "got 'bf16'. The function comes first: "),
    "policy": (jmp.get_policy("bf16"), "The function comes first: "),
    "functions": ((jnp.sin, jnp.cos), "got (<"),
    "Linen module": (nn.Dense(3), "got the Linen module 'Dense'. Give its method apply, such as model.apply"),
    "object with apply": (Transformed(), "Give its function apply."),
}
TAKERS = {
    "autocast": lambda fun: jmp.autocast(fun, "mixed_bfloat16"),
    "explain": lambda fun: jmp.explain(fun, "mixed_bfloat16"),
    "audit": analysis.audit,
    "assert_compute_dtype": lambda fun: analysis.assert_compute_dtype(fun, "bfloat16"),
    "with_policy": lambda fun: jmp.with_policy(fun, "mixed_bfloat16"),
    "scaled_value_and_grad": lambda fun: jmp.scaled_value_and_grad(fun, loss_scale=jmp.NoOpLossScale()),
    "accumulate_gradients": lambda fun: jmp.accumulate_gradients(fun, 2, loss_scale=jmp.NoOpLossScale()),
    "freeze": lambda fun: export.freeze(fun, jnp.ones(2), jnp.ones(2), path="unused"),
    "linen.autocast": lambda fun: jmp.linen.autocast(fun, "mixed_bfloat16"),
    "linen.explain": lambda fun: jmp.linen.explain(fun, "mixed_bfloat16"),
    "linen.with_policy": lambda fun: jmp.linen.with_policy(fun, "mixed_bfloat16"),
    "nnx.autocast": lambda fun: jmp.nnx.autocast(fun, "mixed_bfloat16"),
    "nnx.explain": lambda fun: jmp.nnx.explain(fun, "mixed_bfloat16"),
    "nnx.with_policy": lambda fun: jmp.nnx.with_policy(fun, "mixed_bfloat16"),
    "nnx.scaled_value_and_grad": lambda fun: jmp.nnx.scaled_value_and_grad(fun, loss_scale=jmp.NoOpLossScale()),
}


@pytest.mark.parametrize(("value", "said"), NO_FUNCTIONS.values(), ids=NO_FUNCTIONS)
@pytest.mark.parametrize(("caller", "take"), TAKERS.items(), ids=TAKERS)
def test_what_is_no_function_is_refused(caller, take, value, said):
    """Whoever takes a function says so at once, quotes in short what it got, and says what to give."""
    with pytest.raises(
        jmp.errors.InvalidFunctionError, match=f"^{re.escape(caller)} takes a function, .*{re.escape(said)}"
    ) as caught:
        take(value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "fail",
    [
        lambda: jmp.get_policy("nonsense"),
        lambda: jmp.Policy(jnp.int32, "f16", "f16"),
        lambda: jmp.PolicyMap({"a": "f16", "b": "f32"}, "f32").policy_for("x/a/b"),
        lambda: jmp.PolicyMap({"[": "f16"}, "f32"),
        lambda: jmp.PolicyMap({"a(?i)": "f16"}, "f32"),
        lambda: jmp.PolicyMap({"(a+)+": "f16"}, "f32").policy_for("a" * 40),
        lambda: jmp.PolicyMap({"a+": "f16"}, "f32").policy_for("a" * 1001),
        lambda: jmp.Rule("["),
        lambda: jmp.get_policy("mixed_bflaot16"),
        lambda: jmp.get_policy("fp8"),
        lambda: jmp.get_policy("c=mixed_float16"),
        lambda: jmp.get_policy("conpute=f16"),
        lambda: jmp.get_policy("x" * 9999),
        lambda: jmp.select_tree(1, 2.0, 3.0),
        lambda: jmp.select_tree(True, "a", "b"),
        lambda: jmp.parse_dtype("nonsense"),
    ],
)
def test_message_stands_alone(fail):
    """A message ends in a full stop, says what to do in a second sentence, and hides no other exception."""
    with pytest.raises(jmp.errors.JmpLiteError) as caught:
        fail()
    message = str(caught.value)
    assert message.endswith(".")
    assert 2 <= message.count(". ") + 1 or ": " in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
