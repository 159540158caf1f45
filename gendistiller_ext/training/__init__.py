"""Distillation as `gendistiller distill` does it: the recipe, the data's order, teachers, states, several processes."""
