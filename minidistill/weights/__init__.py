"""Between files and models: safe reading, atomic writing, names of tensors, and pipeline folders."""
