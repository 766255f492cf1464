"""The traced program to an ONNX graph."""
