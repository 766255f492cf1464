"""TensorRT engines: built elsewhere, opened and run here."""
