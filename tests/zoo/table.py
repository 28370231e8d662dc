"""The models, by name."""

from collections.abc import Callable

from . import functions, hugging_face
from .model import Model

MODELS: dict[str, Callable[[], Model]] = {
    "HF BERT": hugging_face.bert,
    "HF GPT-2": hugging_face.gpt2,
    "HF T5": hugging_face.t5,
    "HF ViT": hugging_face.vit,
    "HF Whisper": hugging_face.whisper,
    "Equinox MLP": functions.equinox_mlp,
    "Equinox GRU": functions.equinox_gru,
    "Diffrax neural ODE, fixed steps": functions.neural_ode_fixed_steps,
    "Diffrax neural ODE, adaptive steps": functions.neural_ode_adaptive_steps,
    "FlowJAX spline flow": functions.spline_flow,
    "Haiku ResNet": functions.haiku_resnet,
    "Haiku LSTM": functions.haiku_lstm,
    "jraph GraphNetwork": functions.graph_network,
    "NumPyro ELBO": functions.bayesian_network,
}
