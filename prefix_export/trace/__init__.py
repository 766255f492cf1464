"""What torch traces: a model with its past, and the attention functions that it is traced under."""
