"""ReferFormer: a sentence becomes the queries that look for its object in every frame."""
