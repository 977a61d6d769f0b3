"""The few networks all share, and where blocks sit in those of others."""

from toolkit.core.data.pretrained import pretrained
from toolkit.core.nets.anatomy import Anatomy, anatomy
from toolkit.core.nets.models import ConvNet, convnet, digits_transformer, initialise, mlp
from toolkit.core.nets.planted import planted_teacher
from toolkit.core.nets.text import Batch, TextClassifier, batches, encode, encode_batches
from toolkit.core.nets.transformer import DigitsTransformer

__all__ = [
    "Anatomy",
    "Batch",
    "ConvNet",
    "DigitsTransformer",
    "TextClassifier",
    "anatomy",
    "batches",
    "convnet",
    "digits_transformer",
    "encode",
    "encode_batches",
    "initialise",
    "mlp",
    "planted_teacher",
    "pretrained",
]
