from .losses import *
from .layers import *
from .teacher import *
from .callback import *
