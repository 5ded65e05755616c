"""The computation of a step, and its placement on devices.

``keys``               random keys, one for each purpose
``optimizer``          schedule and optimizer
``step``               one pure training step
``layouts``            one device (jit), copies (pmap), sharded weights (mesh)
``processes``          several processes: joining, and agreeing on values
``flops``              the FLOPs of a step, and device peaks
``compilation_cache``  compiled programs, kept for later runs
``compiled``           the costs of a compiled program: memory, cycles, collectives
``topology``           TPU slices that need not be there, to compile for
``throughput``         speed and memory
"""
