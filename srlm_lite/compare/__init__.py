"""Models held against each other, or against a scale: head to head, annotations, MT-Bench."""
