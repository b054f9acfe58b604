"""The models: targets and drafters, and the layers they share. They hold weights only."""
