"""What a run directory holds.

``files``      arrays and JSON, written whole or not at all
``records``    ``metrics.jsonl``
``directory``  the directory: found again or made, held by one run at a time
``finished``   a finished run, opened again
"""
