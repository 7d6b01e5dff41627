"""Training: from a recipe and samples to a trained audio LLM, by transformers' Trainer.

recipe.py        what a file says: the model's parts, data, stages
model_recipe.py  its part about the model
fields.py        keys read one by one, with all that is wrong collected
located.py       YAML whose values know their place
"""
