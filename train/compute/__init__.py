"""How and where a step is computed.

``keys``        random keys, one for each purpose
``optimizer``   schedule and optimizer
``step``        one pure training step
``layouts``     one device (jit), copies (pmap), sharded weights (mesh)
``processes``   several processes: how they join, and what they agree on
``flops``       the FLOPs of a step, and the peaks of devices
``throughput``  speed and memory
"""
