"""How faithful heatmaps are: one file per question, and the table of tasks that ask it."""
