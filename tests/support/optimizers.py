"""Optax's optimizers by name, each with settings with which a few steps do something."""

import optax
from optax import contrib

from support.comparisons import standard

RATE = 1e-2
ALIASES = {
    "adabelief": lambda: optax.adabelief(RATE),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=8),
    "adafactor with momentum": lambda: optax.adafactor(RATE, momentum=0.9),
    "adagrad": lambda: optax.adagrad(RATE),
    "adam": lambda: optax.adam(RATE),
    "adamax": lambda: optax.adamax(RATE),
    "adamaxw": lambda: optax.adamaxw(RATE),
    "adamw": lambda: optax.adamw(RATE),
    "adan": lambda: optax.adan(RATE),
    "ademamix": lambda: contrib.ademamix(RATE),
    "adopt": lambda: contrib.adopt(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "fromage": lambda: optax.fromage(RATE),
    "lamb": lambda: optax.lamb(RATE),
    "lars": lambda: optax.lars(RATE),
    "lion": lambda: optax.lion(RATE / 10),
    "muon": lambda: contrib.muon(RATE),
    "nadam": lambda: optax.nadam(RATE),
    "nadamw": lambda: optax.nadamw(RATE),
    "noisy sgd": lambda: optax.noisy_sgd(RATE, key=0),
    "novograd": lambda: optax.novograd(RATE),
    "optimistic gradient descent": lambda: optax.optimistic_gradient_descent(RATE),
    "prodigy": lambda: contrib.prodigy(1.0),
    "radam": lambda: optax.radam(RATE),
    "rmsprop": lambda: optax.rmsprop(RATE),
    "rmsprop, centered, momentum": lambda: optax.rmsprop(RATE, centered=True, momentum=0.9),
    "rprop": lambda: optax.rprop(RATE),
    "schedule free": lambda: contrib.schedule_free_adamw(RATE),
    "sgd": lambda: optax.sgd(RATE),
    "sgd with momentum": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "sign sgd": lambda: optax.sign_sgd(RATE / 10),
    "signum": lambda: optax.signum(RATE / 10),
    "sm3": lambda: optax.sm3(RATE),
    "yogi": lambda: optax.yogi(RATE),
}


def optimizer(name):
    """An optimizer that works under strict dtype promotion."""
    return standard(ALIASES[name]())
