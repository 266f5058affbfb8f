"""A small backdoored model with real clean images, shipped so that everything can be seen at work offline."""
