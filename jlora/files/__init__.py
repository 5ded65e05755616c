"""Files of checkpoints and adapters. Nothing is ever unpickled, and every error names the file.

- `hub_files`: the file names in a Hugging Face folder, and a reader of its JSON.
- `tensor_names`: the PyTorch tensors of each leaf of a parameter tree.
- `safetensors`: tensors read lazily, in slices, and written to one file or several.
- `json_files`: JSON objects, read strictly and written atomically.
- `checksums`: the SHA-256 of every file of a folder, written and checked.
- `drafts`: atomic replacement of files.
- `errors`: `TensorError`, raised by all of these, and the errors of `jlora.models` and `jlora.peft`.
"""
