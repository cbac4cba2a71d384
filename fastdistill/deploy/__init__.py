"Files that run without fastai and PyTorch; written by hand"
from .export import export_onnx
from .quantize import quantize_onnx

__all__ = ['export_onnx','quantize_onnx']
