"""The demo model `shapes`: how its pictures are made, judged and learnt.

Rooms, each importing only what stands above it: `scenes` (what can be drawn), `prompts` (how people
say it), `draw` (the pixels), `judge` (did a picture follow?), `vocabulary` (the tokenizer), `nets`
(the three networks), `feed` (training data), `fitting` (one optimisation step), `codec` and `flow`
(the two trainings), `adherence` (the examination), `train` (the command). Nothing here is served.
"""
