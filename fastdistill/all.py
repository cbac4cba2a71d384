"Every public name, for `from fastdistill.all import *`; written by hand, as in fastai."
from .losses import *
from .layers import *
from .teacher import *
from .callback import *
from .check import *
from .items import *
from .plots import *
from .compare import *
from .interpret import *
from .report import *
from .recording import *
