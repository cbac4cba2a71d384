"Every public name of the losses; written by hand, as `__all__` of its modules is not"
from . import base, predictions, levels, features, projected, fused, relations, contrast
from .base import *
from .predictions import *
from .levels import *
from .features import *
from .projected import *
from .fused import *
from .relations import *
from .contrast import *

__all__ = [*base.__all__, *predictions.__all__, *levels.__all__, *features.__all__,
           *projected.__all__, *fused.__all__, *relations.__all__, *contrast.__all__]
