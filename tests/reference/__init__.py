"""Independent references for the tests: a PyTorch model (torch_model), its training (torch_train), NumPy
operations with hand-written gradients (numpy_ops). None of them shares a line with the engine."""
