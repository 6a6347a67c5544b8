"""Any LightningModule, its batches and its outputs meet the engine.

``module`` says what is asked of a module; ``module_adapter`` makes its engine; ``batch_step`` and
``per_sample_step`` run its steps with adapted weights; ``batches``, ``output_tree`` and
``isolation`` take apart what comes and goes, and keep passes from leaving traces.
"""
