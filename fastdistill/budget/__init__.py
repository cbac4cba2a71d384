"The best student within a budget of time and size; written by hand"
from .find import find_student

__all__ = ['find_student']
