"""Attention: which keys a query sees (`mask`), and the forms of computing it (`attend` chooses).

- `plain`: all scores at once. The fastest for short sequences, and what the others are compared with.
- `chunked`: some queries at a time, on any device.
- `tpu`, `gpu`: the kernels that JAX ships or calls.
"""
