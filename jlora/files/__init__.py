"""Files of checkpoints and adapters. Nothing is ever unpickled, and every error names the file.

- `hub_files`: the names of the files in a Hugging Face folder, and the reading of its JSON.
- `tensor_names`: which tensor of a PyTorch model each leaf of a parameter tree is.
- `safetensors`: tensors read lazily, in slices, and written as one file or several.
- `json_files`: JSON objects, read strictly and written atomically.
- `checksums`: the SHA-256 of every file of a folder, written and checked.
- `drafts`: files that are replaced as a whole or not at all.
- `errors`: `TensorError`, which all of these raise.
"""
