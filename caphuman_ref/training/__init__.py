"""Training of the embedded miniature: resumable commands, the same on CPU and CUDA."""
