"""Tasks whose replies code can check: gold scorers, text in, points out."""
