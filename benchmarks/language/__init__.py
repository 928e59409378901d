"""Language models trained with many optimizers: texts, presets, runs, and the commands that compare final losses."""
