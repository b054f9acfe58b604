"""Speed beside mlx-lm and mlx-vlm: libraries in processes of their own that take turns, and plots of records."""
