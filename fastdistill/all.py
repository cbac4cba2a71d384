"Every name that users type, for `from fastdistill.all import *`; written by hand, as in fastai."
from .losses import *
from .layers import get_model_layers, unwrap_model
from .teacher import Ensemble, Teacher
from .objective import Match
from .callback import KnowledgeDistillationCallback, ShowDistillationGraph
