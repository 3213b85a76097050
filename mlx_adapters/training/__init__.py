"""Training of LoRA and DoRA adapters: exact to the bit when it is stopped and resumed.

Read in this order: `rows` (files to rows), `data` (rows to tokens and masks), `batches` (order and padding),
`losses`, `optimizers`, `state` (checkpoints), `loop` (`train` itself), `memory` (the forecast).
"""
