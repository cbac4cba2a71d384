"A teacher's answers on disk, and the same batches again; written by hand"
from .record import record_teacher
from .replay import TeacherRecording

__all__ = ['record_teacher','TeacherRecording']
