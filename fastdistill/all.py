"Every public name, for `from fastdistill.all import *`; written by hand, as in fastai."
from .losses import *
from .layers import *
from .teacher import *
from .callback import *
from .untouched import *
from .matching import *
from .measure import *
from .check import *
from .search import *
from .report import *
from .recording import *
