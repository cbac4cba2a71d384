"The names that users type, for `from fastdistill.all import *`; written by hand, as in fastai."
from .losses import *
from .layers import get_model_layers
from .matching import layer_shapes, match_layers
from .ensemble import Ensemble
from .ema import EMATeacher
from .teacher import Teacher
from .objective import Match
from .callback import KnowledgeDistillationCallback, ShowDistillationGraph
from .recording import TeacherRecording, record_teacher
from .unlabelled import add_unlabelled
from .untouched import untouched
from .measure import agreement, calibration_error
from .compare import compare
from .budget import find_student
from .interpret import DistillationInterpretation
from .report import write_report
from .deploy import export_onnx, quantize_onnx
from . import check as _check, search as _search     # they give Learner its `distill_check` and `weight_finder`
