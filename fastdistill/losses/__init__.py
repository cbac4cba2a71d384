"Every public name of the losses; written by hand, as `__all__` of the four modules is not"
from . import base, predictions, features, relations
from .base import *
from .predictions import *
from .features import *
from .relations import *

__all__ = [*base.__all__, *predictions.__all__, *features.__all__, *relations.__all__]
