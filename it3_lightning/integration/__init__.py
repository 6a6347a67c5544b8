"""Any LightningModule, its batches and its outputs meet the engine.

``module`` says what is asked of a module; ``module_adapter`` makes its engine and runs its steps
with adapted weights, ``per_sample_step`` with those of each sample; ``batches``, ``output_tree``
and ``isolation`` take apart what comes and goes, and keep passes from leaving traces.
"""
