"""The demo model `shapes`: how its pictures are made, judged and learnt.

Rooms, each importing only what stands above it: `scenes` (what can be drawn), `prompts` (how people
say it), `draw` (the pixels), `judge` (did a picture follow?), `vocabulary` (the tokenizer), `nets`
(the three networks) and `passes` (their forward passes), `feed` (training data), `fitting` (one
optimisation step), `codec` (the autoencoder's training), `shelves` (its latents), `flow` (the other
two networks' training), `exam` and `adherence` (the questions and who answers them), `checkpoint`
(the folder), `train` (the command), `lora` (its adapter). Nothing here is served.
"""
