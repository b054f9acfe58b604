"""The HTTP server: OpenAI's and Anthropic's APIs over an engine. Knows text and HTTP, nothing of MLX or models."""
